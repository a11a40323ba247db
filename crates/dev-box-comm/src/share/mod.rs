//! Rules of the 9p workspace.
