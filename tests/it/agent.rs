//! A day's work of a CLI agent, by a stand-in that is a script: it edits files, runs tests, calls an API by HTTP and uses git
//! by ssh, all through the filter of its profile.
//!
//! ```text
//!   VM --tap-- bridge --host--veth-- namespace: api.example.com:80    answers what to write, notes what it is sent
//!                                               git.example.com:22    sshd with one bare repository
//!                                               45.33.64.12:80        nobody's business, until the policy changes
//! ```

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use dev_box_tests::{Host, Internet, skip, wait_until};

const SUBNET: [u8; 3] = [45, 33, 64];
const API: &str = "45.33.64.10";
const GIT: &str = "45.33.64.11";
const OTHER: &str = "45.33.64.12";
const KEY: &str = "key-that-must-not-leak";
/// Whom the repository belongs to: not root.
const OWNER: u32 = 65_534;
const WRONG: &str = "assert 1 + 1 == 3\nprint('tests passed')\n";
const RIGHT: &str = "assert 1 + 1 == 2\nprint('tests passed')\n";

const PROFILE: &str = r#"
credentials = ['AGENT_KEY']
memory = '320MiB'
limit-pids = 100
timeout = '100s'
[env]
GIT_SSH_COMMAND = 'ssh -F none -i /root/key -o UserKnownHostsFile=/root/known_hosts -o IdentitiesOnly=yes'
[network]
mode = 'custom'
ports = ['tcp/80', 'tcp/22']
domains = ['api.example.com', 'git.example.com']
"#;

/// The agent. What it is to find is on its standard output; `arrived` is true only where a policy lets it.
const AGENT: &str = r#"
set -eu
install -m 600 key known_hosts /root
git clone -q ssh://git@git.example.com/work.git repo
cd repo
python3 sums.py 2>/dev/null && exit 20
curl -sSf --max-time 20 -H "x-api-key: $AGENT_KEY" --data-binary @sums.py http://api.example.com/v1/fix > fixed
mv fixed sums.py
python3 sums.py
git -c user.name=agent -c user.email=agent@example.com commit -qam 'the sum is right'
git push -q origin HEAD
arrived() { curl -sSf --connect-timeout 3 --max-time 10 --data-binary "$1" http://45.33.64.12/ 2>/dev/null; }
arrived forbidden && exit 21
echo refused
read -r _
until arrived allowed; do :; done
"#;

/// Answers each request with the right file; keeps what it was sent: head and body.
fn serve(listener: TcpListener) -> Arc<Mutex<Vec<String>>> {
    let requests = Arc::new(Mutex::new(Vec::new()));
    let theirs = Arc::clone(&requests);
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut reader = BufReader::new(&stream);
            let mut request = String::new();
            while reader.read_line(&mut request).is_ok_and(|length| length > 2) {}
            let head = request.to_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let mut body = vec![0; length.and_then(|length| length.parse().ok()).unwrap_or(0)];
            if reader.read_exact(&mut body).is_ok() {
                theirs.lock().unwrap().push(request + &String::from_utf8_lossy(&body));
                let head = format!(
                    "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                    RIGHT.len()
                );
                let _ = stream.write_all((head + RIGHT).as_bytes());
            }
        }
    });
    requests
}

fn at(internet: &Internet, address: &str) -> Result<Arc<Mutex<Vec<String>>>, String> {
    internet.add(address)?;
    let listener =
        internet.inside(|| TcpListener::bind((address, 80)))?.map_err(|error| error.to_string())?;
    Ok(serve(listener))
}

/// Ends with the test.
struct GitServer {
    sshd: Child,
    repository: PathBuf,
}

fn output(command: &mut Command) -> String {
    let done = command.output().unwrap();
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

fn give_away(path: &Path) {
    std::os::unix::fs::lchown(path, Some(OWNER), Some(OWNER)).unwrap();
    for entry in path.is_dir().then(|| fs::read_dir(path).unwrap()).into_iter().flatten() {
        give_away(&entry.unwrap().path());
    }
}

impl GitServer {
    /// One with a repository of one wrong file. The keys that a client needs are put into `workspace`. Nothing of this machine's
    /// own ssh is used: keys and account are made for the test.
    fn start(internet: &Internet, root: &Path, workspace: &Path) -> Result<Self, String> {
        internet.add(GIT)?;
        let (home, seed) = (root.join("git"), root.join("seed"));
        let repository = home.join("work.git");
        fs::create_dir_all(home.join(".ssh")).unwrap();
        fs::create_dir(&seed).unwrap();
        fs::write(seed.join("sums.py"), WRONG).unwrap();
        let git = |words: &str| {
            output(
                Command::new("git")
                    .current_dir(&seed)
                    .args(["-c", "user.name=a", "-c", "user.email=a@b"])
                    .args(words.split(' ')),
            )
        };
        git("init -q -b main");
        git("add .");
        git("commit -qm seed");
        git(&format!("clone -q --bare . {}", repository.display()));

        let (host_key, client_key) = (root.join("host-key"), root.join("client-key"));
        let made = |key: &Path| {
            let told = output(Command::new("dropbearkey").args(["-t", "ed25519", "-f"]).arg(key));
            told.lines().find(|line| line.starts_with("ssh-ed25519 ")).unwrap().to_owned()
        };
        fs::write(workspace.join("known_hosts"), format!("git.example.com {}\n", made(&host_key))).unwrap();
        fs::write(home.join(".ssh/authorized_keys"), made(&client_key) + "\n").unwrap();
        output(
            Command::new("dropbearconvert")
                .args(["dropbear", "openssh"])
                .arg(&client_key)
                .arg(workspace.join("key")),
        );
        // Nothing but the two commands of git, and only in this repository.
        let serve = home.join("serve");
        let script = format!(
            "#!/bin/sh\nPATH='{}'; export PATH\ncase $SSH_ORIGINAL_COMMAND in\n\
             git-upload-pack*) exec git upload-pack {repository};;\ngit-receive-pack*) exec git receive-pack {repository};;\n\
             esac\nexit 1\n",
            std::env::var("PATH").unwrap(),
            repository = repository.display()
        );
        fs::write(&serve, script).unwrap();
        fs::set_permissions(&serve, fs::Permissions::from_mode(0o755)).unwrap();
        give_away(&home);
        let accounts = root.join("passwd");
        fs::write(
            &accounts,
            format!("root:x:0:0::/:/bin/sh\ngit:x:{OWNER}:{OWNER}::{}:/bin/sh\n", home.display()),
        )
        .unwrap();
        let sshd = internet
            .command("sh")
            .args(["-c", "mount --bind \"$1\" /etc/passwd && shift && exec dropbear \"$@\"", "sh"])
            .arg(accounts)
            .args(["-F", "-E", "-s", "-w", "-j", "-k", "-m", "-p", &format!("{GIT}:22"), "-r"])
            .arg(host_key)
            .arg("-c")
            .arg(serve)
            .arg("-P")
            .arg(root.join("sshd.pid"))
            .stdin(Stdio::null())
            .stderr(fs::File::create(root.join("sshd.log")).unwrap())
            .spawn()
            .map_err(|error| error.to_string())?;
        Ok(Self { sshd, repository })
    }

    fn show(&self, what: &str) -> String {
        let mut git = Command::new("git");
        git.args(["-c", "safe.directory=*", "--git-dir"]).arg(&self.repository);
        output(git.args(what.split(' ')))
    }
}

impl Drop for GitServer {
    fn drop(&mut self) {
        let _ = self.sshd.kill();
        let _ = self.sshd.wait();
    }
}

/// Files beneath a directory that hold a text; symbolic links are not followed.
fn holding(text: &str, directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            found.extend(holding(text, &entry.path()));
        } else if kind.is_file() {
            let bytes = fs::read(entry.path()).unwrap_or_default();
            let mut bytes = &bytes[..];
            // Faster by far than comparing at every place: a VM's disk is among them.
            while let Some(at) = bytes.iter().position(|byte| *byte == text.as_bytes()[0]) {
                bytes = &bytes[at..];
                if bytes.starts_with(text.as_bytes()) {
                    found.push(entry.path());
                    break;
                }
                bytes = &bytes[1..];
            }
        }
    }
    found
}

/// The command lines of everything that runs on this host.
fn command_lines() -> String {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    lines.map(|line| String::from_utf8_lossy(&line).into_owned()).collect()
}

#[test]
fn an_agent_works_through_the_filter_of_its_profile() {
    const NAME: &str = "an_agent_works_through_the_filter_of_its_profile";
    let Some(host) = Host::new(NAME) else { return };
    if Command::new("dropbear").arg("-V").output().is_err() {
        return skip(NAME, "needs dropbear");
    }
    let workspace = host.root().join("workspace");
    fs::create_dir(&workspace).unwrap();
    let world = Internet::new(SUBNET).and_then(|mut internet| {
        internet.serve_names(&host, &[("api.example.com", API), ("git.example.com", GIT)])?;
        let git = GitServer::start(&internet, host.root(), &workspace)?;
        Ok((at(&internet, API)?, at(&internet, OTHER)?, git, internet))
    });
    let (api, other, git, _internet) = match world {
        Ok(world) => world,
        Err(why) => return skip(NAME, &why),
    };
    let profile = host.root().join("agent.toml");
    fs::write(&profile, PROFILE).unwrap();

    let mut command = Internet::resolves_for(&host);
    command.env("AGENT_KEY", KEY).env("RUST_LOG", "debug").args(["run", "-i", "--profile"]).arg(&profile);
    command.arg("--workspace").arg(&workspace).args(["--write-back", "--", "sh", "-c", AGENT]);
    let mut agent = host.spawn(&mut command);
    let mut stdin = agent.stdin();
    agent.wait_for_output("tests passed\nrefused\n");

    // While it runs: the key came to the API, and is in nothing that this host keeps or shows.
    let sent = api.lock().unwrap().concat();
    assert!(sent.starts_with("POST /v1/fix ") && sent.ends_with(WRONG), "{sent}");
    assert!(sent.contains(&format!("x-api-key: {KEY}\r\n")), "{sent}");
    let vms = host.vms();
    let [vm] = &vms[..] else { panic!("{vms:?}") };
    let nowhere = || {
        assert_eq!(holding(KEY, host.root()), Vec::<PathBuf>::new());
        assert_eq!(holding(KEY, Path::new("/var/log/libvirt/qemu")), Vec::<PathBuf>::new());
        let lines = command_lines();
        assert!(lines.contains("agent.toml") && !lines.contains(KEY), "it is in a command line");
    };
    nowhere();
    assert!(holding("AGENT_KEY", &host.root().join("audit")).len() == 1, "its name is on record");

    // What was refused arrives when the policy lets it: so it was the policy.
    assert!(other.lock().unwrap().is_empty(), "{other:?} came to where the policy forbids");
    let apply = ["net", "apply", vm, "--net", "nat-filtered"];
    host.spawn(Internet::resolves_for(&host).args(apply)).finish().expect_code(0);
    stdin.write_all(b"go on\n").unwrap();
    wait_until("what is allowed now arrives", Duration::from_secs(120), || !other.lock().unwrap().is_empty());
    let done = agent.finish().expect_code(0);
    assert!(other.lock().unwrap().concat().ends_with("allowed"), "{other:?}");

    assert_eq!(fs::read_to_string(workspace.join("repo/sums.py")).unwrap(), RIGHT);
    assert_eq!(git.show("log --format=%an:%s main"), "agent:the sum is right\na:seed\n");
    assert_eq!(git.show("show main:sums.py"), RIGHT);
    assert!(done.stderr.contains("DEBUG") && !done.stderr.contains(KEY), "the key is in the log");
    assert_eq!(holding(KEY, host.root()), Vec::<PathBuf>::new());
}
