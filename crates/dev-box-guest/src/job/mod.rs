//! Jobs: processes started for the host, each with a tree that ends with it.

mod arena;
mod child;
pub mod plan;
pub mod pty;
pub mod report;
pub mod run;
pub mod spawn;
