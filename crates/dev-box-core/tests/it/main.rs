//! Integration tests, from pure to real virtual machines. What cannot run here says why, and counts as skipped.

mod bench_xml;
mod specs;
mod template;
