//! Numbers for Prometheus: every metric once, with its unit, its help and every value its labels may have.
//!
//! A metric is a constant here; recording goes through it, so a label value that is not in its list is counted as
//! `other` and the number of series is bounded whatever a guest does. Names follow Prometheus's conventions: base
//! units, unit as suffix, `_total` for counters.
//!
//! ```
//! use std::time::Duration;
//! use dev_box_observe::metrics::{EXEC_SECONDS, EXECS, Exporter};
//!
//! let exporter = Exporter::local();
//! exporter.with(|| {
//!     EXECS.add(1, &["ok"]);
//!     EXEC_SECONDS.record(Duration::from_millis(120), &["ok"]);
//! });
//! assert!(exporter.render().contains("dev_box_execs_total{outcome=\"ok\"} 1"));
//! ```

mod catalogue;
mod exporter;
mod per_vm;

pub use catalogue::*;
pub use exporter::{BUCKETS, Exporter, MetricsError};
pub use per_vm::{MAX_VMS, PER_VM, PerVm, VM_SERIES, VmSeries, VmUsage};

use std::sync::OnceLock;
use std::time::Duration;

use ::metrics::{Key, KeyName, Label as KeyLabel, Level, Metadata, SharedString, Unit, with_recorder};

/// What a label value becomes that is not in its list.
pub const OTHER: &str = "other";

static METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, Some(module_path!()));

/// A label and all its values, besides [`OTHER`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label {
    /// The label's name.
    pub name: &'static str,
    /// Its values.
    pub values: &'static [&'static str],
}

/// What kind of number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution.
    Histogram,
}

/// What is known about a metric.
#[derive(Debug, Clone, Copy)]
pub struct Description {
    /// Its full name.
    pub name: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// Its unit.
    pub unit: Unit,
    /// What it says, for `# HELP`.
    pub help: &'static str,
    /// Its labels, in the order in which values are given.
    pub labels: &'static [Label],
}

/// The most series a metric with these labels can have.
const fn series(labels: &[Label]) -> usize {
    let (mut product, mut at) = (1, 0);
    while at < labels.len() {
        product *= labels[at].values.len() + 1;
        at += 1;
    }
    product
}

impl Description {
    /// The most series it can have.
    #[must_use]
    pub fn max_series(&self) -> usize {
        series(self.labels)
    }

    /// Which of its series has these label values.
    fn index(&self, values: &[&str]) -> usize {
        let mut given = values.iter();
        self.labels.iter().fold(0, |index, label| {
            let found = given.next().and_then(|value| label.values.iter().position(|known| known == value));
            index * (label.values.len() + 1) + found.unwrap_or(label.values.len())
        })
    }

    fn key(&self, values: &[&str]) -> Key {
        let mut given = values.iter();
        let labels: Vec<KeyLabel> = self
            .labels
            .iter()
            .map(|label| {
                let known = given.next().and_then(|value| label.values.iter().find(|known| *known == value));
                KeyLabel::from_static_parts(label.name, known.copied().unwrap_or(OTHER))
            })
            .collect();
        Key::from_parts(KeyName::from_const_str(self.name), labels)
    }

    /// Its series, but those of times and those with `other`, at zero.
    fn begin(&self) {
        let mut all: Vec<Vec<&str>> = vec![Vec::new()];
        for label in self.labels {
            let longer = |so_far: Vec<&'static str>| {
                label.values.iter().map(move |value| [so_far.as_slice(), &[*value]].concat())
            };
            all = all.into_iter().flat_map(longer).collect();
        }
        for key in all.iter().map(|values| self.key(values)) {
            with_recorder(|recorder| match self.kind {
                Kind::Counter => recorder.register_counter(&key, &METADATA).increment(0),
                Kind::Gauge => recorder.register_gauge(&key, &METADATA).increment(0.0),
                Kind::Histogram => {}
            });
        }
    }

    fn describe(&self) {
        let (name, unit) = (KeyName::from_const_str(self.name), Some(self.unit));
        let help = SharedString::const_str(self.help);
        with_recorder(|recorder| match self.kind {
            Kind::Counter => recorder.describe_counter(name, unit, help),
            Kind::Gauge => recorder.describe_gauge(name, unit, help),
            Kind::Histogram => recorder.describe_histogram(name, unit, help),
        });
    }
}

/// A metric's series as the process's recorder gave them out, each asked for once.
///
/// Building a key and finding it in the recorder's registry costs two hundred nanoseconds, each time; a handle is an
/// atomic addition. Another recorder (of a test, of a program that brings its own) is asked each time.
#[derive(Debug)]
struct Handles<H: 'static>(&'static [OnceLock<H>]);

impl<H> Handles<H> {
    fn with(
        &self,
        description: &Description,
        values: &[&str],
        make: impl Fn(&Key) -> H,
        record: impl Fn(&H),
    ) {
        if exporter::is_global() {
            if let Some(slot) = self.0.get(description.index(values)) {
                record(slot.get_or_init(|| make(&description.key(values))));
            }
        } else {
            record(&make(&description.key(values)));
        }
    }
}

/// A number that only grows.
#[derive(Debug)]
pub struct Counter {
    /// What it is.
    pub description: Description,
    handles: Handles<::metrics::Counter>,
}

impl Counter {
    /// Adds to the series of these label values.
    pub fn add(&self, count: u64, values: &[&str]) {
        let make = |key: &Key| with_recorder(|recorder| recorder.register_counter(key, &METADATA));
        self.handles.with(&self.description, values, make, |counter| counter.increment(count));
    }
}

/// A number that goes up and down.
#[derive(Debug)]
pub struct Gauge {
    /// What it is.
    pub description: Description,
    handles: Handles<::metrics::Gauge>,
}

impl Gauge {
    /// Sets the series of these label values.
    pub fn set(&self, value: f64, values: &[&str]) {
        self.handles.with(&self.description, values, Self::make, |gauge| gauge.set(value));
    }

    /// Moves the series of these label values up, or (negative) down.
    pub fn change(&self, by: f64, values: &[&str]) {
        self.handles.with(&self.description, values, Self::make, |gauge| gauge.increment(by));
    }

    /// As [`change`](Self::change) by one up, and by one down when the result is dropped: for what is under way.
    #[must_use = "it counts while it is held"]
    pub fn hold(&'static self, values: &'static [&'static str]) -> Held {
        self.change(1.0, values);
        Held { gauge: self, values }
    }

    fn make(key: &Key) -> ::metrics::Gauge {
        with_recorder(|recorder| recorder.register_gauge(key, &METADATA))
    }
}

/// One more in a gauge, until dropped.
#[derive(Debug)]
pub struct Held {
    gauge: &'static Gauge,
    values: &'static [&'static str],
}

impl Drop for Held {
    fn drop(&mut self) {
        self.gauge.change(-1.0, self.values);
    }
}

/// A distribution of times.
#[derive(Debug)]
pub struct Timing {
    /// What it is.
    pub description: Description,
    handles: Handles<::metrics::Histogram>,
}

impl Timing {
    /// Records a time in the series of these label values.
    pub fn record(&self, took: Duration, values: &[&str]) {
        let make = |key: &Key| with_recorder(|recorder| recorder.register_histogram(key, &METADATA));
        self.handles.with(&self.description, values, make, |histogram| histogram.record(took.as_secs_f64()));
    }
}

/// Gives the installed recorder every metric's unit and help, and every series of a counter or gauge that can be foreseen, at zero:
/// what begins with its first event has not grown, for Prometheus, and no alert would tell of that event. [`Exporter::install`]
/// does it.
pub fn describe_all() {
    for description in ALL {
        description.describe();
        description.begin();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_follow_the_conventions() {
        let mut names = BTreeSet::new();
        for metric in ALL {
            let Description { name, kind, unit, help, labels } = metric;
            assert!(names.insert(name), "{name} is there twice");
            assert!(name.starts_with("dev_box_"), "{name}");
            assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{name}");
            assert_eq!(*kind == Kind::Counter, name.ends_with("_total"), "{name}");
            let base = name.trim_end_matches("_total");
            match unit {
                Unit::Seconds => assert!(base.ends_with("_seconds"), "{name}"),
                Unit::Bytes => assert!(base.ends_with("_bytes"), "{name}"),
                _ => assert!(!base.ends_with("_seconds") && !base.ends_with("_bytes"), "{name}"),
            }
            assert_eq!(*kind == Kind::Histogram, *unit == Unit::Seconds, "{name}");
            assert!(help.ends_with('.') && help.len() > 15, "{name}: {help}");
            assert!(metric.max_series() <= 64, "{name} may have {} series", metric.max_series());
            for label in *labels {
                assert!(
                    !["le", "quantile", "job", "instance"].contains(&label.name),
                    "{name}: {}",
                    label.name
                );
                assert!(!label.values.contains(&OTHER), "{name}: `other` is always there");
            }
        }
    }

    #[test]
    fn every_metric_can_be_recorded_and_rendered() {
        let exporter = Exporter::local();
        exporter.with(|| {
            for metric in ALL {
                let values: Vec<_> = metric.labels.iter().map(|label| label.values[0]).collect();
                match metric.kind {
                    Kind::Counter => Counter { description: **metric, handles: Handles(&[]) }.add(3, &values),
                    Kind::Gauge => {
                        let gauge = Gauge { description: **metric, handles: Handles(&[]) };
                        gauge.set(5.0, &values);
                        gauge.change(-3.0, &values);
                    }
                    Kind::Histogram => Timing { description: **metric, handles: Handles(&[]) }
                        .record(Duration::from_micros(30), &values),
                }
            }
        });
        let text = exporter.render();
        for metric in ALL {
            let kind = format!("{:?}", metric.kind).to_lowercase();
            assert!(text.contains(&format!("# TYPE {} {kind}\n", metric.name)), "{}\n{text}", metric.name);
            assert!(text.contains(&format!("# HELP {} {}\n", metric.name, metric.help)), "{}", metric.name);
        }
        assert!(text.contains("dev_box_vms{state=\"starting\"} 2\n"), "{text}");
        assert!(text.contains("dev_box_exec_seconds_bucket{outcome=\"ok\",le=\"0.00005\"} 1\n"), "{text}");
        assert!(text.contains("dev_box_exec_seconds_bucket{outcome=\"ok\",le=\"0.000025\"} 0\n"), "{text}");
        exporter.upkeep();
        let sorted = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
        assert_eq!(sorted(&exporter.render()), sorted(&text), "upkeep changes no numbers");
    }

    #[test]
    fn what_has_not_happened_yet_is_zero() {
        let text = Exporter::local().render();
        for series in [
            "dev_box_findings_total{rule=\"port_scan\"} 0",
            "dev_box_responses_total{action=\"alert\",outcome=\"failed\"} 0",
            "dev_box_net_guard_lost_total 0",
            "dev_box_pool_vms{state=\"ready\"} 0",
        ] {
            assert!(text.lines().any(|line| line == series), "{series}\n{text}");
        }
        assert!(!text.contains("other") && !text.contains("_bucket"), "{text}");
    }

    #[test]
    fn each_combination_of_values_has_a_place_of_its_own() {
        let labels: &[Label] =
            &[Label { name: "a", values: &["x", "y"] }, Label { name: "b", values: &["1", "2", "3"] }];
        let description = Description { labels, ..EXECS.description };
        let mut seen = BTreeSet::new();
        for a in ["x", "y", "?"] {
            for b in ["1", "2", "3", "?"] {
                assert!(seen.insert(description.index(&[a, b])), "{a} {b}");
            }
        }
        assert_eq!(seen.last(), Some(&(description.max_series() - 1)));
        assert_eq!(description.index(&[]), description.max_series() - 1, "what is not given is `other`");
    }

    #[test]
    fn what_is_under_way_is_counted_while_it_is() {
        let exporter = Exporter::local();
        exporter.with(|| {
            let held = VMS.hold(&["running"]);
            assert!(exporter.render().contains("dev_box_vms{state=\"running\"} 1\n"));
            drop(held);
        });
        assert!(exporter.render().contains("dev_box_vms{state=\"running\"} 0\n"));
    }

    proptest! {
        #[test]
        fn no_guest_makes_series(values in proptest::collection::vec(".{0,12}", 0..64)) {
            let exporter = Exporter::local();
            exporter.with(|| {
                for value in &values {
                    EXECS.add(1, &[value]);
                    EXECS.add(1, &[]);
                }
            });
            let text = exporter.render();
            let series = text.lines().filter(|line| line.starts_with("dev_box_execs_total{")).count();
            prop_assert!(series <= EXECS.description.max_series());
        }
    }
}
