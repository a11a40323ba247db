//! Judging a detector as the Numenta Anomaly Benchmark does: its format of data and labels, its scoring, the standard profile.
//! (A. Lavin and S. Ahmad, "Evaluating Real-time Anomaly Detection Algorithms", 2015.) Pure.
//!
//! A detection inside a labelled window is worth up to 1, the earlier the more; each missed window costs 1; a detection
//! outside costs up to 0.11, less when it is close behind a window. The threshold is the one best for all files
//! together. 0 is a detector that says nothing, 100 a perfect one.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::SeriesDetector;

/// What a detection outside of all windows costs in the standard profile.
const FALSE_POSITIVE: f64 = 0.11;
/// The part of a file that is only for learning: 15 %, of 5,000 rows at most.
const PROBATION: f64 = 0.15;
const PROBATION_ROWS: usize = 5000;

/// A row of a series.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// As in the file.
    pub timestamp: String,
    /// In seconds, from any beginning.
    pub at_s: i64,
    /// The value; `None` where there is none, or it is no number.
    pub value: Option<f64>,
}

/// Why a file is none of the benchmark's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SeriesError {
    /// No header that names the two columns.
    #[error("the first line must be `timestamp,value` (more columns may follow)")]
    Header,
    /// A moment that cannot be read.
    #[error("line {line}: {text:?} is no time: `YYYY-MM-DD HH:MM:SS` or seconds")]
    Time {
        /// The line, from 1.
        line: usize,
        /// What stands there.
        text: String,
    },
    /// The labels are not in the benchmark's form.
    #[error("the windows are not as in combined_windows.json: {0}")]
    Windows(String),
}

/// Reads `timestamp,value` and what follows.
///
/// # Errors
/// [`SeriesError::Header`], [`SeriesError::Time`].
pub fn parse(text: &str) -> Result<Vec<Row>, SeriesError> {
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default().trim_start_matches('\u{feff}');
    let mut columns = header.split(',').map(str::trim);
    if columns.next() != Some("timestamp") || columns.next() != Some("value") {
        return Err(SeriesError::Header);
    }
    let mut rows = Vec::new();
    for (number, line) in lines.enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let mut fields = line.split(',').map(str::trim);
        let timestamp = fields.next().unwrap_or_default().to_owned();
        let at_s = seconds(&timestamp).ok_or_else(|| SeriesError::Time {
            line: number + 2,
            text: timestamp.chars().take(80).collect(),
        })?;
        let value =
            fields.next().and_then(|value| value.parse().ok()).filter(|value: &f64| value.is_finite());
        rows.push(Row { timestamp, at_s, value });
    }
    Ok(rows)
}

/// Seconds of a moment without a zone, or the number itself.
fn seconds(text: &str) -> Option<i64> {
    if let Ok(number) = text.parse::<f64>() {
        // Saturating: what is beyond is no moment of anybody's.
        return number.is_finite().then_some(number as i64);
    }
    let formats = ["%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M"];
    let moment = formats.iter().find_map(|format| chrono::NaiveDateTime::parse_from_str(text, format).ok());
    moment.map(|moment| moment.and_utc().timestamp())
}

/// Scores every row.
#[must_use]
pub fn score_rows(rows: &[Row]) -> Vec<f64> {
    let mut detector = SeriesDetector::new();
    rows.iter().map(|row| detector.update(row.at_s, row.value)).collect()
}

/// Labelled windows by file, as in `combined_windows.json`: first and last moment, both inside.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(transparent)]
pub struct Windows(BTreeMap<String, Vec<(String, String)>>);

impl Windows {
    /// Reads the file's text.
    ///
    /// # Errors
    /// [`SeriesError::Windows`].
    pub fn parse(text: &str) -> Result<Self, SeriesError> {
        serde_json::from_str(text).map_err(|error| SeriesError::Windows(error.to_string()))
    }

    /// The files that are labelled.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The windows of a file, in seconds.
    ///
    /// # Errors
    /// [`SeriesError::Windows`]: one of its moments cannot be read.
    pub fn of(&self, file: &str) -> Result<Vec<(i64, i64)>, SeriesError> {
        let read = |text: &String| {
            seconds(text).ok_or_else(|| SeriesError::Windows(format!("{file}: {text:?} is no time")))
        };
        let windows = self.0.get(file).map(Vec::as_slice).unwrap_or_default();
        windows.iter().map(|(from, to)| Ok((read(from)?, read(to)?))).collect()
    }
}

/// What a detection at a row is worth.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Worth {
    /// In a window, by its number over all files.
    Hit { window: usize, value: f64 },
    /// Outside: negative.
    Miss(f64),
}

/// The files of a benchmark, scored; asked for the result when all are in.
#[derive(Debug, Clone, Default)]
pub struct Benchmark {
    /// Score of the detector, and what a detection there is worth.
    rows: Vec<(f64, Worth)>,
    windows: usize,
}

/// How good the detector was.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NabScore {
    /// 0 says nothing, 100 is perfect; negative when it would better say nothing.
    pub score: f64,
    /// The threshold that gives it.
    pub threshold: f64,
    /// Windows found, of how many.
    pub found: usize,
    /// Windows there are.
    pub windows: usize,
    /// Detections outside of windows.
    pub false_positives: usize,
}

impl Benchmark {
    /// Adds a file: its rows, their scores, and its windows in seconds.
    pub fn add(&mut self, rows: &[Row], scores: &[f64], windows: &[(i64, i64)]) {
        let probation = (rows.len().min(PROBATION_ROWS) as f64 * PROBATION) as usize;
        // As row numbers: the benchmark measures in rows.
        let mut spans: Vec<(usize, usize)> = windows
            .iter()
            .filter_map(|(from, to)| {
                let first = rows.iter().position(|row| row.at_s >= *from)?;
                let last = rows.iter().rposition(|row| row.at_s <= *to)?;
                (first <= last).then_some((first, last))
            })
            .collect();
        spans.sort_unstable();
        let before = self.windows;
        self.windows += spans.len();
        for (at, score) in scores.iter().enumerate().skip(probation) {
            let inside = spans.iter().position(|(first, last)| (*first..=*last).contains(&at));
            let worth = match inside.and_then(|number| Some((number, spans.get(number)?))) {
                Some((number, (first, last))) => {
                    let length = (last - first + 1) as f64;
                    let position = -((last - at + 1) as f64) / length;
                    // The first row of a window is worth 1.
                    Worth::Hit { window: before + number, value: scaled(position) / scaled(-1.0) }
                }
                None => {
                    let behind = spans.iter().rev().find(|(_, last)| *last < at);
                    let share = behind.map_or(-1.0, |(first, last)| {
                        let length = (last - first).max(1) as f64;
                        scaled((at - last) as f64 / length)
                    });
                    Worth::Miss(share * FALSE_POSITIVE)
                }
            };
            self.rows.push((*score, worth));
        }
    }

    /// The score at the best threshold. `None` without any window.
    #[must_use]
    pub fn finish(mut self) -> Option<NabScore> {
        if self.windows == 0 {
            return None;
        }
        self.rows.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut best_of: BTreeMap<usize, f64> = BTreeMap::new();
        let (mut value, mut false_positives) = (-(self.windows as f64), 0);
        let says_nothing =
            NabScore { score: 0.0, threshold: 2.0, found: 0, windows: self.windows, false_positives: 0 };
        let mut best = says_nothing;
        let mut rows = self.rows.iter().peekable();
        while let Some((score, worth)) = rows.next() {
            match *worth {
                Worth::Hit { window, value: hit } => match best_of.get_mut(&window) {
                    None => {
                        value += 1.0 + hit;
                        best_of.insert(window, hit);
                    }
                    Some(known) if hit > *known => {
                        value += hit - *known;
                        *known = hit;
                    }
                    Some(_) => {}
                },
                Worth::Miss(cost) => {
                    value += cost;
                    false_positives += 1;
                }
            }
            // A threshold lets all rows of a score in, or none.
            if rows.peek().is_some_and(|(next, _)| next == score) {
                continue;
            }
            let windows = self.windows as f64;
            let normalised = 100.0 * (value + windows) / (2.0 * windows);
            if normalised > best.score {
                let found = best_of.len();
                best = NabScore {
                    score: normalised,
                    threshold: *score,
                    found,
                    windows: self.windows,
                    false_positives,
                };
            }
        }
        Some(best)
    }
}

/// The benchmark's sigmoid: 1 far before the window's end, 0 at it, -1 far behind.
fn scaled(position: f64) -> f64 {
    if position > 3.0 {
        return -1.0;
    }
    2.0 / (1.0 + (5.0 * position).exp()) - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(count: usize) -> Vec<Row> {
        (0..count).map(|at| Row { timestamp: at.to_string(), at_s: at as i64, value: Some(0.0) }).collect()
    }

    /// Detections at these rows of a file of a thousand, with one window.
    fn scored(detections: &[usize]) -> NabScore {
        let mut scores = vec![0.0; 1000];
        for at in detections {
            scores[*at] = 1.0;
        }
        let mut benchmark = Benchmark::default();
        benchmark.add(&rows(1000), &scores, &[(500, 599)]);
        benchmark.finish().unwrap()
    }

    #[test]
    fn the_scale_is_the_benchmarks() {
        let perfect = scored(&[500]);
        assert!((perfect.score - 100.0).abs() < 1e-9, "{perfect:?}");
        assert_eq!((perfect.found, perfect.false_positives), (1, 0));
        assert_eq!(scored(&[]).score, 0.0);
        assert_eq!(scored(&[900]).score, 0.0, "better to say nothing");
        assert_eq!(scored(&[10]).score, 0.0, "and the beginning does not count");
        let late = scored(&[599]);
        assert!(late.score > 50.0 && late.score < 60.0, "{late:?}");
        let noisy = scored(&[500, 700, 800, 900]);
        assert!((noisy.score - (100.0 - 3.0 * 5.5)).abs() < 0.5, "{noisy:?}");
        let close = scored(&[500, 601]);
        assert!(close.score > 99.0, "{close:?}");
        assert!(Benchmark::default().finish().is_none());
    }

    #[test]
    fn one_threshold_is_for_all_files() {
        let mut benchmark = Benchmark::default();
        for scale in [1.0, 0.5] {
            let mut scores = vec![0.0; 1000];
            scores[500] = scale;
            scores[800] = 0.4;
            benchmark.add(&rows(1000), &scores, &[(500, 599)]);
        }
        let result = benchmark.finish().unwrap();
        assert_eq!((result.threshold, result.found, result.windows), (0.5, 2, 2));
    }

    #[test]
    fn the_benchmarks_files_are_read() {
        let rows =
            parse("timestamp,value\n2014-02-14 14:30:00,0.132\n2014-02-14 14:35:00,\n\n1392388200,nan\n")
                .unwrap();
        assert_eq!(rows[1].at_s - rows[0].at_s, 300);
        assert_eq!((rows[0].value, rows[1].value, rows[2].value), (Some(0.132), None, None));
        assert_eq!(rows[2].at_s, rows[0].at_s);
        assert_eq!(parse("a,b\n"), Err(SeriesError::Header));
        assert!(matches!(parse("timestamp,value\nyesterday,1\n"), Err(SeriesError::Time { line: 2, .. })));
        let windows = Windows::parse(
            r#"{"real/a.csv": [["2014-02-14 14:30:00.000000", "2014-02-14 15:30:00.000000"]], "real/b.csv": []}"#,
        )
        .unwrap();
        assert_eq!(windows.files().count(), 2);
        let [(from, to)] = windows.of("real/a.csv").unwrap()[..] else { panic!() };
        assert_eq!((from, to - from), (rows[0].at_s, 3600));
        assert!(Windows::parse("[]").is_err());
        assert!(Windows::parse(r#"{"a": [["x", "y"]]}"#).unwrap().of("a").is_err());
    }

    /// Series in the benchmark's shape, made here: the benchmark's own are not shipped.
    fn generated(seed: u64) -> (Vec<Row>, Vec<(i64, i64)>) {
        let noise = |step: u64, of: u64| {
            let mixed =
                (step + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed.wrapping_mul(of + 7));
            let mixed = (mixed ^ (mixed >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (mixed >> 40) as f64 / f64::from(1_u32 << 24) - 0.5
        };
        let odd = 2000 + seed % 5 * 300;
        let rows = (0..4032_u64).map(|step| {
            let of_day = ((step % 288) as f64 / 288.0 * std::f64::consts::TAU).sin();
            let usual = 40.0 + 10.0 * of_day + 4.0 * noise(step, 1);
            let inside = (odd..odd + 24).contains(&step);
            let value = match seed % 3 {
                0 if inside => usual + 60.0,
                1 if inside => 2.0,
                2 if inside => usual + 40.0 * noise(step, 2),
                _ => usual,
            };
            Row { timestamp: String::new(), at_s: step as i64 * 300, value: Some(value) }
        });
        // Labelled as the benchmark does: some way around what happened.
        (rows.collect(), vec![((odd as i64 - 100) * 300, (odd as i64 + 300) * 300)])
    }

    #[test]
    fn the_detector_finds_spikes_outages_and_noise_in_generated_series() {
        let mut benchmark = Benchmark::default();
        for seed in 0..12 {
            let (rows, windows) = generated(seed);
            benchmark.add(&rows, &score_rows(&rows), &windows);
        }
        let result = benchmark.finish().unwrap();
        assert!(result.score > 60.0, "{result:?}");
    }
}
