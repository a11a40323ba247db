//! Every metric there is.

use std::sync::OnceLock;

use ::metrics::Unit;

use super::{Counter, Description, Gauge, Handles, Kind, Label, Timing, series};

macro_rules! catalogue {
    ($( $constant:ident: $type:ident = $name:literal, $kind:ident, $unit:ident, $help:literal,
        { $($label:ident: [$($value:literal),* $(,)?]),* } )*) => {
        $(
            #[doc = $help]
            pub static $constant: $type = {
                const LABELS: &[Label] = &[$(Label { name: stringify!($label), values: &[$($value),*] }),*];
                static HANDLES: [OnceLock<::metrics::$kind>; series(LABELS)] = [const { OnceLock::new() }; series(LABELS)];
                $type {
                    description: Description {
                        name: concat!("dev_box_", $name),
                        kind: Kind::$kind,
                        unit: Unit::$unit,
                        help: $help,
                        labels: LABELS,
                    },
                    handles: Handles(&HANDLES),
                }
            };
        )*

        /// Every metric, but those of single VMs ([`PER_VM`](super::PER_VM)).
        pub static ALL: &[&Description] = &[$(&$constant.description),*];
    };
}

catalogue! {
    VMS: Gauge = "vms", Gauge, Count, "VMs of this process, by state.",
        { state: ["starting", "running", "ending"] }
    VM_STARTS: Counter = "vm_starts_total", Counter, Count, "VMs that were to be made, by how that ended.",
        { accelerator: ["kvm", "tcg"], outcome: ["ok", "failed"] }
    VM_DEATHS: Counter = "vm_deaths_total", Counter, Count, "VMs that ended though nobody here ended them.",
        { cause: ["ended", "violation", "silent"] }
    VM_BOOT_SECONDS: Timing = "vm_boot_seconds", Histogram, Seconds,
        "Time from the start of a domain to its agent's answer.", { accelerator: ["kvm", "tcg"] }
    VM_CLONE_SECONDS: Timing = "vm_clone_seconds", Histogram, Seconds,
        "Time to clone a VM from a template.", { accelerator: ["kvm", "tcg"] }
    VM_RESET_SECONDS: Timing = "vm_reset_seconds", Histogram, Seconds,
        "Time to make a VM clean for its next lease.", { method: ["replace", "rewind"] }
    VM_DESTROY_SECONDS: Timing = "vm_destroy_seconds", Histogram, Seconds,
        "Time to take a VM away with everything it had.", { outcome: ["ok", "failed"] }
    VM_SWEPT: Counter = "vm_swept_total", Counter, Count,
        "Leftovers of dead processes that were removed.", {}
    POOL_VMS: Gauge = "pool_vms", Gauge, Count, "VMs in the pool, by state.",
        { state: ["filling", "ready", "leased", "resetting", "retiring"] }
    POOL_WAITING: Gauge = "pool_waiting", Gauge, Count, "Callers that wait for a VM of the pool.", {}
    LEASE_ACQUIRE_SECONDS: Timing = "lease_acquire_seconds", Histogram, Seconds,
        "Time from asking for a VM to having it.", { outcome: ["hit", "miss", "timeout", "failed"] }
    EXECS: Counter = "execs_total", Counter, Count, "Commands run, by how they ended.",
        { outcome: ["ok", "nonzero", "signal", "timeout", "cancelled", "lost", "refused"] }
    EXEC_SECONDS: Timing = "exec_seconds", Histogram, Seconds, "Time from a command's request to its end.",
        { outcome: ["ok", "nonzero", "signal", "timeout", "cancelled", "lost"] }
    EXEC_OUTPUT_BYTES: Counter = "exec_output_bytes_total", Counter, Bytes, "Output received from commands.",
        { stream: ["stdout", "stderr"] }
    WORKSPACE_FILES: Counter = "workspace_files_total", Counter, Count,
        "Workspace files copied, or refused on the way out.", { direction: ["in", "out", "refused"] }
    WORKSPACE_BYTES: Counter = "workspace_bytes_total", Counter, Bytes, "Workspace bytes copied.",
        { direction: ["in", "out"] }
    NET_DROPPED_PACKETS: Counter = "net_dropped_packets_total", Counter, Count,
        "Packets of guests that the guard dropped, by reason.",
        { reason: ["spoofed", "protocol", "gateway", "host", "neighbour", "denied", "special", "destination", "port",
                   "rate", "connections", "unsolicited"] }
    NET_GUARD_LOST: Counter = "net_guard_lost_total", Counter, Count,
        "Times the rules in the kernel were not those put there.", {}
    NET_HOST_CHANGED: Counter = "net_host_changed_total", Counter, Count,
        "Times a VM's packets met a host that had changed: libvirt's NAT gone or back, forwarding, bridge-nf-call-iptables.", {}
    GUEST_VIOLATIONS: Counter = "guest_violations_total", Counter, Count,
        "Times a guest broke the protocol; its VM is destroyed.", {}
    AUDIT_RECORDS: Counter = "audit_records_total", Counter, Count, "Audit entries, by what became of them.",
        { outcome: ["written", "refused", "failed", "dropped"] }
    AUDIT_GROUP_SECONDS: Timing = "audit_group_seconds", Histogram, Seconds,
        "Time to write and sync a group of audit records.", {}
    AUDIT_LAG_SECONDS: Timing = "audit_lag_seconds", Histogram, Seconds,
        "Time the longest waiting entry of a group took to be on disk.", {}
    AUDIT_WAIT_SECONDS: Timing = "audit_wait_seconds", Histogram, Seconds,
        "Time somebody waited for an audit entry to be on disk.", {}
    AUDIT_REFUSING: Gauge = "audit_refusing", Gauge, Count,
        "Whether the audit log refuses new work, 1 or 0.", {}
    FINDINGS: Counter = "findings_total", Counter, Count, "Anomalies found, by rule.",
        { rule: ["metadata_contact", "private_contact", "port_scan", "fan_out", "dns_tunnel", "beaconing",
                 "egress_volume", "mining", "mass_change", "fork_rate", "memory_pressure", "output_flood",
                 "clock_jump", "statistical"] }
    OBSERVATIONS_LOST: Counter = "observations_lost_total", Counter, Count,
        "Observations that the detectors did not keep up with.", {}
    RESPONSES: Counter = "responses_total", Counter, Count, "What was done about anomalies, by action.",
        { action: ["log", "alert", "throttle", "pause", "snapshot", "kill"], outcome: ["ok", "failed"] }
    ERRORS: Counter = "errors_total", Counter, Count, "Errors, by the layer they came from.",
        { layer: ["libvirt", "channel", "guest", "network", "image", "workspace", "audit", "config"] }
}
