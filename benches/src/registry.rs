//! Every benchmark by name.

use std::error::Error;

use crate::figure::Figure;
use crate::{channel, command, end_to_end, micro, network, pool, snapshots};

/// Why a benchmark could not run.
pub(crate) type NotRun = Box<dyn Error>;

/// One benchmark: it may bring several figures, each with its own name below the benchmark's.
#[derive(Debug)]
pub(crate) struct Benchmark {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    /// The beginnings of its figures' names, where they are not the benchmark's own.
    pub(crate) figures: &'static [&'static str],
    pub(crate) run: fn(&Wanted, &mut Report),
}

/// What was measured, told as it comes.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) figures: Vec<Figure>,
    /// What could not be measured, and why.
    pub(crate) not_run: Vec<String>,
}

impl Report {
    /// A part of a benchmark, by its name: if it could not run, the others can.
    pub(crate) fn part(&mut self, name: &str, measured: Result<Vec<Figure>, NotRun>) {
        self.take(measured.map_err(|error| format!("{name}: {}", with_causes(&error)).into()));
    }

    /// A benchmark.
    pub(crate) fn take(&mut self, measured: Result<Vec<Figure>, NotRun>) {
        match measured {
            Ok(figures) => {
                for figure in &figures {
                    eprintln!("  {figure}");
                }
                self.figures.extend(figures);
            }
            Err(error) => {
                let why = with_causes(&error);
                eprintln!("  not run: {why}");
                self.not_run.push(why);
            }
        }
    }
}

fn with_causes(error: &NotRun) -> String {
    let (mut text, mut cause) = (error.to_string(), error.source());
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// Which figures are asked for, so that a benchmark of many need not take all.
#[derive(Debug, Default)]
pub(crate) struct Wanted(Vec<String>);

impl Wanted {
    /// What was named on the command line; of `benchmark`, all is wanted when it was named itself.
    pub(crate) fn of(benchmark: &Benchmark, names: &[String]) -> Self {
        let whole = names.is_empty() || names.iter().any(|name| benchmark.name.starts_with(name.as_str()));
        Self(if whole { Vec::new() } else { names.to_vec() })
    }

    /// Whether that figure, or one whose name begins so, is wanted.
    pub(crate) fn has(&self, figure: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|name| figure.starts_with(name) || name.starts_with(figure))
    }
}

/// All of them, cheap ones first.
const ALL: &[Benchmark] = &[
    Benchmark {
        name: "codec",
        about: "frames of 64 KiB to bytes and back, beside memcpy and CRC32 in the same run",
        figures: &[],
        run: |_, report| report.take(micro::codec::run()),
    },
    Benchmark {
        name: "xml.build",
        about: "a VM's specification to libvirt's XML",
        figures: &[],
        run: |_, report| report.take(micro::xml::run()),
    },
    Benchmark {
        name: "metrics",
        about: "a counter and a time recorded; everything rendered, with a hundred VMs",
        figures: &[],
        run: |_, report| report.take(micro::observe::metrics()),
    },
    Benchmark {
        name: "audit",
        about: "entries appended to the audit log, a thousand a second: the writer's time, the callers', and the disk alone",
        figures: &["baseline.audit"],
        run: |_, report| report.take(micro::audit::run()),
    },
    Benchmark {
        name: "anomaly",
        about: "one sample through each detector",
        figures: &[],
        run: |_, report| report.take(micro::observe::anomaly()),
    },
    Benchmark {
        name: "boot.cold",
        about: "a VM from nothing to an agent that knows who it is, and each step of it",
        figures: &[],
        run: |_, report| report.take(end_to_end::boot_cold()),
    },
    Benchmark {
        name: "exec.true",
        about: "/bin/true in a VM, from the request to its exit; beside it a ping, the guest alone, and by a plain port",
        figures: &["baseline.spawn"],
        run: |_, report| command::run(report),
    },
    Benchmark {
        name: "wait.started",
        about: "from libvirt saying that a VM runs to our knowing it",
        figures: &[],
        run: |_, report| report.take(snapshots::wait_started()),
    },
    Benchmark {
        name: "snapshot",
        about: "going back in place, beside virsh snapshot-revert on the same VM in the same run",
        figures: &[],
        run: |_, report| report.take(snapshots::restore()),
    },
    Benchmark {
        name: "channel",
        about: "a VM's channel: echo, exec's overhead, attach, output, files; and a plain pipe over the same kind of port",
        figures: &["baseline.pipe"],
        run: |_, report| report.take(channel::run()),
    },
    Benchmark {
        name: "exec.lost",
        about: "from the kill of QEMU to the news of it",
        figures: &[],
        run: |_, report| report.take(channel::lost()),
    },
    Benchmark {
        name: "net",
        about: "another policy for a VM that runs, a look at all its layers, and what filtering costs in throughput",
        figures: &[],
        run: |_, report| report.take(network::run()),
    },
    Benchmark {
        name: "pool",
        about: "clones, shells, rewinds and hand-overs of a pool, beside cold boots and what libvirt and QEMU offer",
        figures: pool::FIGURES,
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
        benchmark.name.starts_with(name)
            || name.starts_with(&format!("{}.", benchmark.name))
            || benchmark
                .figures
                .iter()
                .any(|figure| figure.starts_with(name) || name.starts_with(&format!("{figure}.")))
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

    #[derive(Debug, thiserror::Error)]
    #[error("loading failed")]
    struct Loading(#[source] std::io::Error);

    fn names(chosen: &[&str]) -> Vec<&'static str> {
        let chosen: Vec<String> = chosen.iter().map(|name| (*name).to_owned()).collect();
        choose(&chosen).unwrap().iter().map(|benchmark| benchmark.name).collect()
    }

    #[test]
    fn a_part_that_failed_is_named_with_all_causes() {
        let mut report = Report::default();
        report.part("clone.ready", Err(Loading(std::io::Error::other("no QEMU")).into()));
        report.part("reset.rewind", Ok(Vec::new()));
        assert_eq!(report.not_run, ["clone.ready: loading failed: no QEMU"]);
    }

    #[test]
    fn benchmarks_are_chosen_by_the_beginning_of_their_names() {
        assert_eq!(names(&[]).len(), ALL.len());
        assert_eq!(names(&["xml"]), ["xml.build"]);
        assert_eq!(names(&["codec.encode.64k"]), ["codec"]);
        assert_eq!(names(&["reset.rewind"]), ["pool"]);
        assert_eq!(names(&["observe.cycle.rewind"]), ["pool"]);
        let pool = choose(&["pool".to_owned()]).unwrap()[0];
        let wants = |name: &str| Wanted::of(pool, &[name.to_owned()]);
        assert!(wants("pool").has("reset.rewind") && wants("reset").has("reset.rewind"));
        assert!(!wants("reset.rewind").has("clone.ready"));
        let error = choose(&["nonsense".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("xml.build"));
    }
}
