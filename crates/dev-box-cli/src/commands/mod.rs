//! One module a command.

pub(crate) mod audit;
pub(crate) mod completions;
pub(crate) mod doctor;
pub(crate) mod gc;
pub(crate) mod image;
pub(crate) mod net;
pub(crate) mod run;
pub(crate) mod template;
