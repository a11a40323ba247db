//! dev-box as a whole, on real VMs.

mod daemon;
mod doctor;
mod net;
mod run;
mod template;
mod vsock;
