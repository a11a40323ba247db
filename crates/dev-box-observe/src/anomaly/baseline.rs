//! What VMs of one image and size usually do, minute by minute, learnt over many of them and kept on disk.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Score, Why, score_of};

/// The numbers of a minute, by name: use of the CPUs, and the logarithms of bytes a second on disk and network.
pub(super) const SERIES: [&str; 3] = ["cpu", "disk", "network"];

/// Minutes that must have been seen before a baseline is believed: some twenty jobs of ten minutes.
const WARM: u32 = 200;
/// Beyond so many, old minutes fade: what is usual changes with the tools.
const MEMORY: u32 = 10_000;
/// How far off the usual is odd, in deviations. Agents' minutes are no normal numbers: their tails are heavy.
const THRESHOLD: f64 = 8.0;
/// The largest file that is read as a baseline.
const MAX_BYTES: u64 = 64 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
struct Level {
    mean: f64,
    variance: f64,
}

/// The usual minute.
///
/// # Examples
/// ```
/// use dev_box_observe::anomaly::Baseline;
/// let mut baseline = Baseline::default();
/// for minute in 0..300_u32 {
///     baseline.learn([f64::from(minute % 10) / 20.0, 8.0, 6.0]);
/// }
/// assert!(!baseline.score([0.4, 8.0, 6.0]).unwrap().is_odd());
/// assert!(baseline.score([0.4, 8.0, 16.0]).unwrap().is_odd());
/// ```
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Baseline {
    minutes: u32,
    levels: [Level; SERIES.len()],
}

impl Baseline {
    /// Takes a minute in. What is no number is left out.
    pub fn learn(&mut self, minute: [f64; SERIES.len()]) {
        if !minute.iter().all(|number| number.is_finite()) {
            return;
        }
        self.minutes = self.minutes.saturating_add(1);
        let weight = 1.0 / f64::from(self.minutes.min(MEMORY));
        for (level, number) in self.levels.iter_mut().zip(minute) {
            let off = number - level.mean;
            level.mean += weight * off;
            level.variance = (1.0 - weight) * (level.variance + weight * off * off);
        }
    }

    /// How odd a minute is, by the number that is furthest off. `None` until enough minutes were seen.
    #[must_use]
    pub fn score(&self, minute: [f64; SERIES.len()]) -> Option<Score> {
        if self.minutes < WARM {
            return None;
        }
        let scored = self.levels.iter().zip(minute).zip(SERIES).map(|((level, number), name)| {
            // A tenth of a CPU, or of a power of e, is no news however steady the past.
            let deviation = (number - level.mean) / level.variance.sqrt().max(0.1);
            (deviation, name)
        });
        let (deviation, name) = scored
            .filter(|(deviation, _)| deviation.is_finite())
            .max_by(|a, b| a.0.abs().total_cmp(&b.0.abs()))?;
        let why = Why::Together { deviation, name, by: deviation };
        Some(Score { score: score_of(deviation.abs(), THRESHOLD), deviation, why })
    }

    /// Takes in what another one has learnt: of a VM that has ended.
    pub fn merge(&mut self, other: &Self) {
        let total = f64::from(self.minutes) + f64::from(other.minutes);
        if other.minutes == 0 {
            return;
        }
        let share = f64::from(other.minutes) / total;
        for (level, theirs) in self.levels.iter_mut().zip(other.levels) {
            let off = theirs.mean - level.mean;
            level.variance += share * (theirs.variance - level.variance) + share * (1.0 - share) * off * off;
            level.mean += share * off;
        }
        self.minutes = self.minutes.saturating_add(other.minutes).min(MEMORY);
    }
}

/// Baselines by profile, a file each in one directory.
#[derive(Debug, Clone)]
pub struct BaselineStore {
    dir: PathBuf,
}

impl BaselineStore {
    /// In this directory, which is made when something is kept.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    fn path(&self, profile: &str) -> PathBuf {
        // A name that no profile can leave the directory by.
        let name: String = profile
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || "-_".contains(c) { c } else { '_' })
            .collect();
        self.dir.join(format!("{name}.json"))
    }

    /// What is known of a profile: nothing where there is no file, and where it is not one of ours.
    #[must_use]
    pub fn load(&self, profile: &str) -> Baseline {
        let path = self.path(profile);
        match read(&path) {
            Ok(baseline) => baseline,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Baseline::default(),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a baseline is not readable: it is learnt anew");
                Baseline::default()
            }
        }
    }

    /// Adds what a VM of the profile has taught, whole or not at all. Two processes at once may lose one's minutes.
    ///
    /// # Errors
    /// The directory or file cannot be written.
    pub fn add(&self, profile: &str, learnt: &Baseline) -> io::Result<()> {
        let mut baseline = self.load(profile);
        baseline.merge(learnt);
        fs::create_dir_all(&self.dir)?;
        let path = self.path(profile);
        let new = path.with_extension(format!("new-{}", std::process::id()));
        fs::write(&new, serde_json::to_vec(&baseline)?)?;
        fs::rename(&new, &path)
    }
}

fn read(path: &Path) -> io::Result<Baseline> {
    let size = fs::metadata(path)?.len();
    if size > MAX_BYTES {
        return Err(io::Error::other(format!("{size} bytes are no baseline")));
    }
    let baseline: Baseline = serde_json::from_slice(&fs::read(path)?)?;
    let sound = baseline.levels.iter().all(|level| level.mean.is_finite() && level.variance >= 0.0);
    sound.then_some(baseline).ok_or_else(|| io::Error::other("its numbers make no sense"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_two_have_learnt_is_what_one_would_have(
            first in proptest::collection::vec(0.0..20.0_f64, 1..60),
            second in proptest::collection::vec(0.0..20.0_f64, 1..60),
        ) {
            let learn = |numbers: &[f64]| {
                let mut baseline = Baseline::default();
                numbers.iter().for_each(|n| baseline.learn([*n, n * 2.0, 1.0]));
                baseline
            };
            let mut merged = learn(&first);
            merged.merge(&learn(&second));
            let whole = learn(&[first, second].concat());
            prop_assert_eq!(merged.minutes, whole.minutes);
            for (a, b) in merged.levels.iter().zip(whole.levels) {
                prop_assert!((a.mean - b.mean).abs() < 1e-6 && (a.variance - b.variance).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn they_are_kept_by_profile_and_survive_rubbish() {
        let dir = tempfile::tempdir().unwrap();
        let store = BaselineStore::new(dir.path().join("baselines"));
        assert_eq!(store.load("default-1x256"), Baseline::default());
        let mut learnt = Baseline::default();
        learnt.learn([0.5, 8.0, 3.0]);
        store.add("../default/1", &learnt).unwrap();
        store.add("../default/1", &learnt).unwrap();
        assert_eq!(store.load("../default/1").minutes, 2);
        let files: Vec<_> = fs::read_dir(dir.path().join("baselines")).unwrap().collect();
        assert_eq!(files.len(), 1, "in its directory, and nothing half-written");
        for rubbish in ["", "{}", r#"{"minutes":1,"levels":[]}"#, &"x".repeat(70_000)] {
            fs::write(store.path("../default/1"), rubbish).unwrap();
            assert_eq!(store.load("../default/1"), Baseline::default(), "{rubbish}");
        }
    }

    #[test]
    fn nothing_is_odd_before_enough_is_known() {
        let mut baseline = Baseline::default();
        for _ in 0..WARM - 1 {
            baseline.learn([0.1, 1.0, 1.0]);
            baseline.learn([f64::NAN, 1.0, 1.0]);
        }
        assert!(baseline.score([1.0, 30.0, 30.0]).is_none());
    }
}
