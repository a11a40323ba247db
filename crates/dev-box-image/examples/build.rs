//! Builds the image `default`: `build AGENT [STATE_ROOT [TARBALL]]`, as root.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example speaks on its terminal")]

use std::path::PathBuf;
use std::process::ExitCode;

use dev_box_image::{Build, Builder, ImageStore, Outcome, Progress, Step};

struct Terminal;

impl Progress for Terminal {
    fn step(&self, step: Step) {
        eprintln!("[{}/{}] {step}", step.number(), Step::ALL.len());
    }

    fn detail(&self, text: &str) {
        eprintln!("      {text}");
    }
}

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprintln!("  because: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let agent = arguments.next().ok_or("give the path of the agent's binary")?;
    let root = arguments.next().unwrap_or_else(|| "/var/lib/dev-box".into());
    let name = "default".parse()?;
    let build = match arguments.next() {
        Some(tarball) => Build::tar(name, agent, tarball),
        None => Build::packages(name, agent),
    };
    let store = ImageStore::open(root)?;
    let outcome = Builder::system().build(&store, &build, &Terminal)?;
    let manifest = outcome.manifest();
    let word = if matches!(outcome, Outcome::Built(_)) { "built" } else { "already there" };
    println!(
        "{}: {word}, {}, kernel {}, {}",
        manifest.name, manifest.digest, manifest.kernel.version, manifest.size
    );
    Ok(())
}
