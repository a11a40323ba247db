//! Run CLI coding agents, and the code they write, in disposable KVM virtual machines.
