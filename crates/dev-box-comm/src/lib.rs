//! The control channel between host and guest: frames, messages, multiplexed streams, transports.
