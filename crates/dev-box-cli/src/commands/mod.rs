//! One module a command.

pub(crate) mod anomaly;
pub(crate) mod attach;
pub(crate) mod audit;
pub(crate) mod completions;
pub(crate) mod cp;
pub(crate) mod doctor;
pub(crate) mod events;
pub(crate) mod exec;
pub(crate) mod forensics;
pub(crate) mod gc;
pub(crate) mod image;
pub(crate) mod kill;
pub(crate) mod logs;
pub(crate) mod net;
pub(crate) mod pool;
pub(crate) mod port_forward;
pub(crate) mod ps;
pub(crate) mod rm;
pub(crate) mod run;
pub(crate) mod serve;
pub(crate) mod shell;
pub(crate) mod snapshot;
pub(crate) mod start;
pub(crate) mod template;
pub(crate) mod top;
pub(crate) mod vm;
