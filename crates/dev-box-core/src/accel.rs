//! Which accelerator this host can run guests with.
//!
//! KVM needs two things: the CPU's virtualisation flag (`vmx` or `svm` in `/proc/cpuinfo`) **and** a `/dev/kvm` that
//! opens for reading and writing. The device alone proves nothing: some cloud machines expose one on which a stock
//! kernel hangs.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// At most this much of `/proc/cpuinfo` is read: the first CPU's flags are what is looked for.
const CPUINFO_MAX: u64 = 256 * 1024;

/// How QEMU executes the guest's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// Hardware virtualisation.
    Kvm,
    /// QEMU's translator: slow, and by QEMU's own documentation no security boundary.
    Tcg,
}

impl Accelerator {
    /// `kvm` or `tcg`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Neither `kvm` nor `tcg`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no accelerator: use kvm or tcg")]
pub struct UnknownAccelerator(String);

impl FromStr for Accelerator {
    type Err = UnknownAccelerator;

    fn from_str(text: &str) -> Result<Self, UnknownAccelerator> {
        match text {
            "kvm" => Ok(Self::Kvm),
            "tcg" => Ok(Self::Tcg),
            other => Err(UnknownAccelerator(other.chars().take(64).collect())),
        }
    }
}

/// Why KVM cannot be used here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoKvm {
    /// The CPU offers no virtualisation.
    #[error("the CPU shows neither vmx nor svm in {}: turn virtualisation on in the firmware, or, inside a VM, ask for nested virtualisation", .cpuinfo.display())]
    NoCpuFlag {
        /// The file that was read.
        cpuinfo: PathBuf,
    },
    /// The CPU's description could not be read.
    #[error("cannot read {}: {error}", .cpuinfo.display())]
    CpuinfoUnreadable {
        /// The file.
        cpuinfo: PathBuf,
        /// The system's error.
        error: String,
    },
    /// There is no device.
    #[error("{} does not exist: load the module kvm_intel or kvm_amd", .device.display())]
    NoDevice {
        /// The device.
        device: PathBuf,
    },
    /// The device is there and not for this user.
    #[error("{} may not be opened by this user: join the group kvm, or run as root", .device.display())]
    DeviceForbidden {
        /// The device.
        device: PathBuf,
    },
    /// The device does not open.
    #[error("{} does not open: {error}", .device.display())]
    DeviceBroken {
        /// The device.
        device: PathBuf,
        /// The system's error.
        error: String,
    },
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detection {
    /// What guests can be run with.
    pub accelerator: Accelerator,
    /// Why not with KVM; `None` when it works.
    pub why_not_kvm: Option<NoKvm>,
}

/// Which accelerator is acceptable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AcceleratorPolicy {
    /// KVM where it works, else TCG, said aloud.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// TCG, even where KVM works.
    Tcg,
}

impl AcceleratorPolicy {
    /// What a VM runs with on a host where `detection` was made.
    ///
    /// # Errors
    /// KVM is required and does not work: why not.
    pub fn choose(self, detection: Detection) -> Result<Detection, NoKvm> {
        match (self, detection) {
            (Self::Tcg, detection) => Ok(Detection { accelerator: Accelerator::Tcg, ..detection }),
            (Self::Kvm, Detection { why_not_kvm: Some(why), .. }) => Err(why),
            (_, detection) => Ok(detection),
        }
    }
}

/// Where to look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbePaths {
    /// Normally `/proc/cpuinfo`.
    pub cpuinfo: PathBuf,
    /// Normally `/dev/kvm`.
    pub kvm: PathBuf,
}

impl Default for ProbePaths {
    fn default() -> Self {
        Self { cpuinfo: "/proc/cpuinfo".into(), kvm: "/dev/kvm".into() }
    }
}

/// Looks at this host.
#[must_use]
pub fn detect() -> Detection {
    detect_at(&ProbePaths::default())
}

/// Looks at `paths` in place of the host's.
#[must_use]
pub fn detect_at(paths: &ProbePaths) -> Detection {
    match probe(paths) {
        Ok(()) => Detection { accelerator: Accelerator::Kvm, why_not_kvm: None },
        Err(why) => Detection { accelerator: Accelerator::Tcg, why_not_kvm: Some(why) },
    }
}

fn probe(paths: &ProbePaths) -> Result<(), NoKvm> {
    let text = read_head(&paths.cpuinfo).map_err(|error| NoKvm::CpuinfoUnreadable {
        cpuinfo: paths.cpuinfo.clone(),
        error: error.to_string(),
    })?;
    if !has_virtualisation(&text) {
        return Err(NoKvm::NoCpuFlag { cpuinfo: paths.cpuinfo.clone() });
    }
    let device = paths.kvm.clone();
    match OpenOptions::new().read(true).write(true).open(&device) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(NoKvm::NoDevice { device }),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(NoKvm::DeviceForbidden { device })
        }
        Err(error) => Err(NoKvm::DeviceBroken { device, error: error.to_string() }),
    }
}

fn read_head(path: &PathBuf) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(CPUINFO_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Whether a `flags` line has `vmx` or `svm` as a word. (`vmx flags` is another line.)
fn has_virtualisation(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(key, _)| key.trim() == "flags")
        .any(|(_, flags)| flags.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn at(cpuinfo: Option<&str>, device: bool) -> (tempfile::TempDir, Detection) {
        let dir = tempfile::tempdir().unwrap();
        let paths = ProbePaths { cpuinfo: dir.path().join("cpuinfo"), kvm: dir.path().join("kvm") };
        if let Some(text) = cpuinfo {
            fs::write(&paths.cpuinfo, text).unwrap();
        }
        if device {
            fs::write(&paths.kvm, "").unwrap();
        }
        let found = detect_at(&paths);
        (dir, found)
    }

    #[test]
    fn kvm_needs_flag_and_device() {
        let intel = "processor\t: 0\nflags\t\t: fpu vmx sse\nvmx flags\t: vnmi\n";
        let (_dir, found) = at(Some(intel), true);
        assert_eq!(found, Detection { accelerator: Accelerator::Kvm, why_not_kvm: None });
        assert_eq!(at(Some("flags : fpu svm"), true).1.accelerator, Accelerator::Kvm);
    }

    #[test]
    fn a_device_without_the_flag_is_tcg() {
        for text in ["flags : fpu sse", "vmx flags : vmx", "flags : vmxoff svmx", "model name : svm", ""] {
            let (_dir, found) = at(Some(text), true);
            assert_eq!(found.accelerator, Accelerator::Tcg, "{text}");
            assert!(matches!(found.why_not_kvm, Some(NoKvm::NoCpuFlag { .. })), "{text}");
        }
    }

    #[test]
    fn each_reason_is_told() {
        let (_a, missing) = at(Some("flags : vmx"), false);
        assert!(matches!(missing.why_not_kvm, Some(NoKvm::NoDevice { .. })));
        let (_b, unread) = at(None, true);
        assert!(matches!(unread.why_not_kvm, Some(NoKvm::CpuinfoUnreadable { .. })));
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cpuinfo"), "flags : svm").unwrap();
        // A directory opens for nobody, root included.
        let paths = ProbePaths { cpuinfo: dir.path().join("cpuinfo"), kvm: dir.path().into() };
        let broken = detect_at(&paths).why_not_kvm.unwrap();
        assert!(matches!(broken, NoKvm::DeviceBroken { .. }), "{broken}");
        assert!(NoKvm::DeviceForbidden { device: "/dev/kvm".into() }.to_string().contains("group kvm"));
    }

    #[test]
    fn this_host_is_consistent() {
        let found = detect();
        assert_eq!(found.accelerator == Accelerator::Kvm, found.why_not_kvm.is_none());
    }

    #[test]
    fn names() {
        for accelerator in [Accelerator::Kvm, Accelerator::Tcg] {
            assert_eq!(accelerator.to_string().parse::<Accelerator>().unwrap(), accelerator);
        }
        assert!("xen".parse::<Accelerator>().unwrap_err().to_string().contains("xen"));
    }

    #[test]
    fn a_policy_never_falls_back_from_required_kvm() {
        let kvm = Detection { accelerator: Accelerator::Kvm, why_not_kvm: None };
        let why = NoKvm::NoDevice { device: "/dev/kvm".into() };
        let tcg = Detection { accelerator: Accelerator::Tcg, why_not_kvm: Some(why.clone()) };
        let chosen =
            |policy: AcceleratorPolicy, on: &Detection| policy.choose(on.clone()).map(|d| d.accelerator);
        assert_eq!(chosen(AcceleratorPolicy::Auto, &kvm), Ok(Accelerator::Kvm));
        assert_eq!(chosen(AcceleratorPolicy::Auto, &tcg), Ok(Accelerator::Tcg));
        assert_eq!(chosen(AcceleratorPolicy::Kvm, &kvm), Ok(Accelerator::Kvm));
        assert_eq!(chosen(AcceleratorPolicy::Kvm, &tcg), Err(why));
        assert_eq!(chosen(AcceleratorPolicy::Tcg, &kvm), Ok(Accelerator::Tcg));
    }
}
