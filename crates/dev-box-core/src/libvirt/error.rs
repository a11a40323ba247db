//! What libvirt answers when it does not do as asked, sorted by its error codes.

/// A refusal or failure of libvirt. `message` is libvirt's own text, which may quote what a guest sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LibvirtError {
    /// Nobody listens at the daemon's socket.
    #[error(
        "no libvirt daemon answers ({message}): start it with `systemctl start libvirtd`, or with `virtlogd -d; libvirtd -d` where there is no systemd"
    )]
    DaemonNotRunning {
        /// Libvirt's text.
        message: String,
    },
    /// The socket is not for this user.
    #[error(
        "this user may not talk to libvirt ({message}): join the group libvirt and log in again, or run as root"
    )]
    PermissionDenied {
        /// Libvirt's text.
        message: String,
    },
    /// The URI names nothing that libvirt can open.
    #[error(
        "libvirt cannot open that URI ({message}): use one such as qemu:///system, qemu:///session or qemu+ssh://HOST/system"
    )]
    BadUri {
        /// Libvirt's text.
        message: String,
    },
    /// The connection broke before or during the call. Whether the call took effect is not known.
    #[error(
        "the connection to libvirt was lost ({message}): it is being opened again; look at the state before trying again"
    )]
    ConnectionLost {
        /// Libvirt's text.
        message: String,
    },
    /// The connection is read-only.
    #[error("the connection is read-only ({message}): open it for writing")]
    ReadOnly {
        /// Libvirt's text.
        message: String,
    },
    /// No such domain.
    #[error("no such VM ({message})")]
    NoSuchDomain {
        /// Libvirt's text.
        message: String,
    },
    /// No such snapshot.
    #[error("no such snapshot ({message})")]
    NoSuchSnapshot {
        /// Libvirt's text.
        message: String,
    },
    /// No such network.
    #[error("no such network ({message})")]
    NoSuchNetwork {
        /// Libvirt's text.
        message: String,
    },
    /// No such filter.
    #[error("no such network filter ({message})")]
    NoSuchFilter {
        /// Libvirt's text.
        message: String,
    },
    /// The domain has no such device.
    #[error("no such device ({message})")]
    NoSuchDevice {
        /// Libvirt's text.
        message: String,
    },
    /// The name or UUID belongs to another.
    #[error("the name or UUID is taken ({message}): choose another, or remove what has it")]
    NameTaken {
        /// Libvirt's text.
        message: String,
    },
    /// Something still uses it.
    #[error("it is in use ({message})")]
    InUse {
        /// Libvirt's text.
        message: String,
    },
    /// The XML is not what libvirt understands.
    #[error("libvirt refuses the definition ({message})")]
    InvalidXml {
        /// Libvirt's text.
        message: String,
    },
    /// Not legal in the object's present state.
    #[error("not possible in the present state ({message})")]
    InvalidOperation {
        /// Libvirt's text.
        message: String,
    },
    /// The driver, QEMU or the host cannot do it.
    #[error("not supported here ({message})")]
    Unsupported {
        /// Libvirt's text.
        message: String,
    },
    /// A device stands in the way of saving the VM's state.
    #[error(
        "the VM's state cannot be saved ({message}): unmount its 9p shares in the guest first, or take a disk-only snapshot"
    )]
    SnapshotBlocked {
        /// Libvirt's text.
        message: String,
    },
    /// The host's disk is full.
    #[error("no space left on the host ({message}): make room, or move the state to a larger disk")]
    NoSpace {
        /// Libvirt's text.
        message: String,
    },
    /// QEMU could not write the VM's memory. (It says "input/output error" for a full disk as well.)
    #[error("the VM's memory could not be written ({message}): is the disk that holds its image full?")]
    StateNotWritten {
        /// Libvirt's text.
        message: String,
    },
    /// The guest agent does not answer.
    #[error("the guest agent does not answer ({message}): is qemu-guest-agent running in the guest?")]
    AgentUnresponsive {
        /// Libvirt's text.
        message: String,
    },
    /// Libvirt gave up waiting, for a lock or for QEMU.
    #[error("libvirt timed out ({message}): something else is being done to this VM, or its QEMU hangs")]
    TimedOut {
        /// Libvirt's text.
        message: String,
    },
    /// QEMU or the host failed.
    #[error("libvirt failed ({message})")]
    OperationFailed {
        /// Libvirt's error code (`virErrorNumber`).
        code: u32,
        /// Libvirt's text.
        message: String,
    },
}

/// The codes (`virErrorNumber`) that are told apart; the numbers are part of libvirt's stable interface.
mod code {
    pub(super) const INTERNAL_ERROR: u32 = 1;
    pub(super) const NO_SUPPORT: u32 = 3;
    pub(super) const UNKNOWN_HOST: u32 = 4;
    pub(super) const NO_CONNECT: u32 = 5;
    pub(super) const INVALID_CONN: u32 = 6;
    pub(super) const INVALID_ARG: u32 = 8;
    pub(super) const OPERATION_FAILED: u32 = 9;
    pub(super) const OS_TYPE: u32 = 16;
    pub(super) const XML_ERROR: u32 = 27;
    pub(super) const DOM_EXIST: u32 = 28;
    pub(super) const OPERATION_DENIED: u32 = 29;
    pub(super) const XML_DETAIL: u32 = 35;
    pub(super) const NETWORK_EXIST: u32 = 37;
    pub(super) const SYSTEM_ERROR: u32 = 38;
    pub(super) const RPC: u32 = 39;
    pub(super) const NO_DOMAIN: u32 = 42;
    pub(super) const NO_NETWORK: u32 = 43;
    pub(super) const AUTH_FAILED: u32 = 45;
    pub(super) const OPERATION_INVALID: u32 = 55;
    pub(super) const NO_NWFILTER: u32 = 62;
    pub(super) const CONFIG_UNSUPPORTED: u32 = 67;
    pub(super) const OPERATION_TIMEOUT: u32 = 68;
    pub(super) const NO_DOMAIN_SNAPSHOT: u32 = 72;
    pub(super) const ARGUMENT_UNSUPPORTED: u32 = 74;
    pub(super) const AUTH_CANCELLED: u32 = 79;
    pub(super) const OPERATION_UNSUPPORTED: u32 = 84;
    pub(super) const AGENT_UNRESPONSIVE: u32 = 86;
    pub(super) const RESOURCE_BUSY: u32 = 87;
    pub(super) const ACCESS_DENIED: u32 = 88;
    pub(super) const XML_INVALID_SCHEMA: u32 = 92;
    pub(super) const AUTH_UNAVAILABLE: u32 = 94;
    pub(super) const AGENT_UNSYNCED: u32 = 97;
    pub(super) const DEVICE_MISSING: u32 = 99;
    pub(super) const NO_NWFILTER_BINDING: u32 = 101;
    pub(super) const AGENT_COMMAND_TIMEOUT: u32 = 112;
    pub(super) const AGENT_COMMAND_FAILED: u32 = 113;
}

impl LibvirtError {
    /// Sorts an error of libvirt by its code, and, where one code means many things, by its text.
    #[must_use]
    pub fn from_libvirt(number: u32, message: &str) -> Self {
        let message = message.trim().to_owned();
        let has = |needle: &str| message.contains(needle);
        // Texts that matter more than the code that carries them.
        if has("No space left on device") {
            return Self::NoSpace { message };
        }
        if has("State blocked by non-migratable device")
            || has("Migration is disabled when VirtFS export path")
        {
            return Self::SnapshotBlocked { message };
        }
        // The daemon asks polkit about users other than root, and polkit is reached by D-Bus.
        if has("Unable to get system bus connection") {
            return Self::PermissionDenied { message };
        }
        if has("Error while writing VM state") {
            return Self::StateNotWritten { message };
        }
        match number {
            code::NO_CONNECT | code::UNKNOWN_HOST => Self::BadUri { message },
            code::SYSTEM_ERROR if has("Failed to connect socket") || has("Cannot recv data") => {
                if has("Permission denied") {
                    Self::PermissionDenied { message }
                } else if has("Failed to connect socket") {
                    Self::DaemonNotRunning { message }
                } else {
                    Self::ConnectionLost { message }
                }
            }
            code::AUTH_FAILED | code::AUTH_CANCELLED | code::AUTH_UNAVAILABLE | code::ACCESS_DENIED => {
                Self::PermissionDenied { message }
            }
            code::OPERATION_DENIED => Self::ReadOnly { message },
            code::INVALID_CONN | code::RPC => Self::ConnectionLost { message },
            _ if has("client socket is closed")
                || has("End of file while reading data")
                || has("Cannot write data") =>
            {
                Self::ConnectionLost { message }
            }
            code::NO_DOMAIN => Self::NoSuchDomain { message },
            code::NO_DOMAIN_SNAPSHOT => Self::NoSuchSnapshot { message },
            code::NO_NETWORK => Self::NoSuchNetwork { message },
            code::DEVICE_MISSING => Self::NoSuchDevice { message },
            code::NO_NWFILTER | code::NO_NWFILTER_BINDING => Self::NoSuchFilter { message },
            code::DOM_EXIST | code::NETWORK_EXIST => Self::NameTaken { message },
            // "operation failed: domain 'x' already exists with uuid ..." and its like for every kind of object.
            code::OPERATION_FAILED | code::OPERATION_INVALID | code::INVALID_ARG
                if (has("domain '") && has("is already active"))
                    || has("already exists")
                    || has("already defined")
                    || has("is already in use") =>
            {
                Self::NameTaken { message }
            }
            code::XML_ERROR | code::XML_DETAIL | code::XML_INVALID_SCHEMA | code::OS_TYPE => {
                Self::InvalidXml { message }
            }
            code::OPERATION_INVALID if has("in use") => Self::InUse { message },
            code::RESOURCE_BUSY => Self::InUse { message },
            code::OPERATION_INVALID => Self::InvalidOperation { message },
            // The driver `test` says so with this code.
            code::INTERNAL_ERROR
                if ["' not running", "' not paused", "is already running"].into_iter().any(has) =>
            {
                Self::InvalidOperation { message }
            }
            code::NO_SUPPORT
            | code::CONFIG_UNSUPPORTED
            | code::ARGUMENT_UNSUPPORTED
            | code::OPERATION_UNSUPPORTED => Self::Unsupported { message },
            code::AGENT_UNRESPONSIVE
            | code::AGENT_UNSYNCED
            | code::AGENT_COMMAND_TIMEOUT
            | code::AGENT_COMMAND_FAILED => Self::AgentUnresponsive { message },
            code::OPERATION_TIMEOUT => Self::TimedOut { message },
            code => Self::OperationFailed { code, message },
        }
    }

    /// Whether the connection itself is what failed.
    #[must_use]
    pub fn is_connection_lost(&self) -> bool {
        matches!(self, Self::ConnectionLost { .. })
    }

    /// Whether libvirt could not add a filter's rules, and has none in force instead: its ebtables reads all rules before it changes one, and
    /// is at a loss when somebody else has changed some meanwhile.
    #[must_use]
    pub fn is_rule_conflict(&self) -> bool {
        matches!(self, Self::OperationFailed { message, .. } if message.contains("failed to add new filter rules"))
    }

    /// Whether what was asked for does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(
            self,
            Self::NoSuchDomain { .. }
                | Self::NoSuchSnapshot { .. }
                | Self::NoSuchNetwork { .. }
                | Self::NoSuchFilter { .. }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorted_by_code_and_text() {
        let sort = LibvirtError::from_libvirt;
        let cases: [(LibvirtError, &str); 33] = [
            (
                sort(9, "snapshot-save job failed: Error while writing VM state: Input/output error"),
                "StateNotWritten",
            ),
            (sort(55, "Requested operation is not valid: domain 'x' is already active as 'y'"), "NameTaken"),
            (
                sort(
                    38,
                    "Failed to connect socket to '/var/run/libvirt/libvirt-sock': No such file or directory",
                ),
                "DaemonNotRunning",
            ),
            (sort(38, "Failed to connect socket to '/x': Connection refused"), "DaemonNotRunning"),
            (sort(38, "Failed to connect socket to '/x': Permission denied"), "PermissionDenied"),
            (sort(45, "authentication failed"), "PermissionDenied"),
            (
                sort(1, "internal error: Unable to get system bus connection: No such file"),
                "PermissionDenied",
            ),
            (sort(38, "Cannot recv data: Connection reset by peer"), "ConnectionLost"),
            (sort(1, "internal error: client socket is closed"), "ConnectionLost"),
            (sort(38, "Cannot write data: Broken pipe"), "ConnectionLost"),
            (sort(38, "End of file while reading data: Input/output error"), "ConnectionLost"),
            (sort(5, "no connection driver available for nope:///"), "BadUri"),
            (sort(29, "operation virDomainCreate forbidden for read only access"), "ReadOnly"),
            (sort(42, "Domain not found"), "NoSuchDomain"),
            (sort(72, "no domain snapshot with matching name 'x'"), "NoSuchSnapshot"),
            (sort(43, "Network not found"), "NoSuchNetwork"),
            (sort(99, "device not found: no device matching MAC address x"), "NoSuchDevice"),
            (sort(62, "no nwfilter with matching name 'x'"), "NoSuchFilter"),
            (sort(101, "no nwfilter binding for port dev 'x'"), "NoSuchFilter"),
            (sort(9, "operation failed: domain 'x' already exists with uuid y"), "NameTaken"),
            (sort(55, "domain is already active as 'x': is already in use"), "NameTaken"),
            (sort(28, "exists"), "NameTaken"),
            (sort(55, "Requested operation is not valid: nwfilter is in use"), "InUse"),
            (sort(27, "XML error"), "InvalidXml"),
            (sort(92, "schema"), "InvalidXml"),
            (sort(55, "domain is not running"), "InvalidOperation"),
            (sort(67, "unsupported configuration"), "Unsupported"),
            (sort(3, "this function is not supported"), "Unsupported"),
            (sort(86, "Guest agent is not responding"), "AgentUnresponsive"),
            (sort(68, "Timed out during operation: cannot acquire state change lock"), "TimedOut"),
            (sort(1, "unable to write: No space left on device"), "NoSpace"),
            (sort(55, "State blocked by non-migratable device '0000:00:01.5/virtio-9p'"), "SnapshotBlocked"),
            (sort(1, "internal error: QEMU died"), "OperationFailed"),
        ];
        for (error, variant) in &cases {
            assert!(format!("{error:?}").starts_with(variant), "{error:?} is no {variant}");
        }
        assert!(sort(42, "x").is_not_found() && !sort(1, "x").is_not_found());
        assert!(sort(39, "x").is_connection_lost() && !sort(38, "x").is_connection_lost());
    }

    #[test]
    fn what_a_user_can_do_is_said() {
        for (number, text, advice) in [
            (38, "Failed to connect socket to '/x': No such file", "systemctl start libvirtd"),
            (38, "Failed to connect socket to '/x': Permission denied", "group libvirt"),
            (1, "No space left on device", "make room"),
            (86, "gone", "qemu-guest-agent"),
            (5, "no driver", "qemu:///system"),
            (55, "Migration is disabled when VirtFS export path '/x' is mounted", "unmount"),
        ] {
            let error = LibvirtError::from_libvirt(number, text).to_string();
            assert!(error.contains(advice) && error.contains(text), "{error}");
        }
    }
}
