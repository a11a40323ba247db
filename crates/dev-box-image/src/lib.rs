//! What lies on disk: guest images, overlays, space limits, clean-up.
