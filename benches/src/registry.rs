//! Every benchmark by name.

use std::error::Error;

use crate::figure::Figure;
use crate::{channel, end_to_end, micro, pool, snapshots};

/// Why a benchmark could not run.
pub(crate) type NotRun = Box<dyn Error>;

/// One benchmark: it may bring several figures, each with its own name below the benchmark's.
#[derive(Debug)]
pub(crate) struct Benchmark {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) run: fn() -> Result<Vec<Figure>, NotRun>,
}

/// All of them, cheap ones first.
const ALL: &[Benchmark] = &[
    Benchmark {
        name: "codec",
        about: "frames of 64 KiB to bytes and back, beside memcpy and CRC32 in the same run",
        run: micro::codec::run,
    },
    Benchmark { name: "xml.build", about: "a VM's specification to libvirt's XML", run: micro::xml::run },
    Benchmark {
        name: "metrics",
        about: "a counter and a time recorded; everything rendered, with a hundred VMs",
        run: micro::observe::metrics,
    },
    Benchmark {
        name: "audit",
        about: "entries appended to the audit log in groups, at a thousand a second",
        run: micro::observe::audit,
    },
    Benchmark { name: "anomaly", about: "one sample through each detector", run: micro::observe::anomaly },
    Benchmark {
        name: "boot.cold",
        about: "a VM from nothing to an agent that knows who it is, and each step of it",
        run: end_to_end::boot_cold,
    },
    Benchmark {
        name: "exec.true",
        about: "/bin/true in a VM, from the request to its exit; and a ping beside it",
        run: end_to_end::exec_true,
    },
    Benchmark {
        name: "wait.started",
        about: "from libvirt saying that a VM runs to our knowing it",
        run: snapshots::wait_started,
    },
    Benchmark {
        name: "snapshot",
        about: "going back in place, beside virsh snapshot-revert on the same VM in the same run",
        run: snapshots::restore,
    },
    Benchmark {
        name: "channel",
        about: "a VM's channel: echo, exec's overhead, attach, output, files",
        run: channel::run,
    },
    Benchmark { name: "exec.lost", about: "from the kill of QEMU to the news of it", run: channel::lost },
    Benchmark {
        name: "pool",
        about: "clones of a template and hand-overs of a pool, beside cold boots",
        run: pool::run,
    },
];

#[derive(Debug, thiserror::Error)]
#[error("no benchmark's name begins with {name:?}; there are: {known}")]
pub(crate) struct Unknown {
    name: String,
    known: String,
}

/// The benchmarks whose names begin with one of `names`; all when `names` is empty.
pub(crate) fn choose(names: &[String]) -> Result<Vec<&'static Benchmark>, Unknown> {
    // `codec.encode` asks for the benchmark that has this figure among others.
    let fits = |benchmark: &Benchmark, name: &str| {
        benchmark.name.starts_with(name) || name.starts_with(&format!("{}.", benchmark.name))
    };
    if let Some(name) = names.iter().find(|name| !ALL.iter().any(|benchmark| fits(benchmark, name))) {
        let known: Vec<_> = ALL.iter().map(|benchmark| benchmark.name).collect();
        return Err(Unknown { name: name.clone(), known: known.join(", ") });
    }
    Ok(ALL
        .iter()
        .filter(|benchmark| names.is_empty() || names.iter().any(|name| fits(benchmark, name)))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(chosen: &[&str]) -> Vec<&'static str> {
        let chosen: Vec<String> = chosen.iter().map(|name| (*name).to_owned()).collect();
        choose(&chosen).unwrap().iter().map(|benchmark| benchmark.name).collect()
    }

    #[test]
    fn benchmarks_are_chosen_by_the_beginning_of_their_names() {
        assert_eq!(names(&[]).len(), ALL.len());
        assert_eq!(names(&["xml"]), ["xml.build"]);
        assert_eq!(names(&["codec.encode.64k"]), ["codec"]);
        let error = choose(&["nonsense".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("xml.build"));
    }
}
