//! A libvirtd of a test's own: in a mount namespace where libvirt's directories are the test's, with its own socket. The
//! machine's own libvirtd sees nothing of it. Needs root.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long the daemon may take to come up or to end.
const DAEMON: Duration = Duration::from_secs(60);
/// The user that Debian's libvirt runs QEMU as.
const USER: &str = "libvirt-qemu";
/// What libvirt's packages compile in, and the directory that takes its place.
const PLACES: [(&str, &str); 5] = [
    ("/etc/libvirt", "etc"),
    ("/run/libvirt", "run"),
    ("/var/lib/libvirt", "lib"),
    ("/var/cache/libvirt", "cache"),
    ("/var/log/libvirt", "log"),
];
/// Without KVM, whose probing takes libvirt minutes on a machine where it is there and does not work; in its place is a
/// file that QEMU's user may not open. (Were it `/dev/null`, libvirt would think it usable, find QEMU without it, and
/// probe again at every use.)
/// Holds the namespace until its standard input ends, and then ends everything in it.
const HOLDER: &str = r#"set -eu
home=$1
shift
while [ $# -gt 0 ]; do
	mount --bind "$home/$2" "$1"
	shift 2
done
if [ -e /dev/kvm ]; then
	: >"$home/nokvm"
	chmod 0 "$home/nokvm"
	mount --bind "$home/nokvm" /dev/kvm
fi
echo ready
cat >/dev/null
for file in "$home/libvirtd.pid" "$home"/run/qemu/*.pid; do
	if [ -e "$file" ]; then kill -9 "$(cat "$file")" 2>/dev/null || true; fi
done
"#;

/// A private libvirtd. Dropped, it ends with all its domains, and its directory goes.
#[derive(Debug)]
pub struct Libvirtd {
    home: PathBuf,
    holder: Child,
    daemon: Option<Child>,
}

impl Libvirtd {
    /// Starts one whose files are in a directory. The path must be short, for its socket is in it.
    pub fn start(home: &Path) -> Result<Self> {
        for (place, own) in PLACES {
            fs::create_dir_all(place).with_context(|| format!("create {place}"))?;
            fs::create_dir_all(home.join(own))?;
        }
        fs::create_dir_all(home.join("sock"))?;
        let passwd = fs::read_to_string("/etc/passwd")?;
        let user = if passwd
            .lines()
            .any(|line| line.starts_with(&format!("{USER}:")))
        {
            USER
        } else {
            "root"
        };
        fs::write(
            home.join("etc/qemu.conf"),
            format!(
                "security_driver = \"none\"\nuser = \"{user}\"\nstdio_handler = \"file\"\nnamespaces = []\ncgroup_controllers = []\nremember_owner = 0\n"
            ),
        )?;
        fs::write(
            home.join("etc/libvirtd.conf"),
            format!(
                "unix_sock_dir = \"{0}/sock\"\nauth_unix_rw = \"none\"\nlog_outputs = \"2:file:{0}/libvirtd.log\"\nhost_uuid = \"{1}\"\n",
                home.display(),
                host_uuid(home),
            ),
        )?;
        let mut holder = Command::new("unshare")
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                HOLDER,
                "holder",
            ])
            .arg(home)
            .args(PLACES.iter().flat_map(|(place, own)| [*place, *own]))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("run unshare")?;
        let mut ready = [0; 5];
        let said = holder.stdout.as_mut().map(|out| out.read_exact(&mut ready));
        let mut libvirtd = Self {
            home: home.into(),
            holder,
            daemon: None,
        };
        if !matches!(said, Some(Ok(()))) {
            bail!("no mount namespace for libvirtd: are you root?");
        }
        libvirtd.start_daemon()?;
        Ok(libvirtd)
    }

    /// A command that sees libvirt's directories as the daemon does.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg("--mount")
            .arg("--target")
            .arg(self.holder.id().to_string())
            .arg("--")
            .arg(program);
        command
    }

    /// The process whose mount namespace the daemon is in.
    pub fn namespace(&self) -> u32 {
        self.holder.id()
    }

    /// Its directory.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// What libvirt's clients connect to.
    pub fn uri(&self) -> String {
        let socket = self.home.join("sock/libvirt-sock");
        format!("qemu+unix:///system?socket={}", socket.display())
    }

    /// Starts the daemon; its domains are found again.
    pub fn start_daemon(&mut self) -> Result<()> {
        let log = fs::File::create(self.home.join("libvirtd.out"))?;
        let child = self
            .command(Path::new("libvirtd"))
            .arg("--pid-file")
            .arg(self.home.join("libvirtd.pid"))
            .args(["--config", "/etc/libvirt/libvirtd.conf"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("run libvirtd")?;
        self.daemon = Some(child);
        let deadline = Instant::now() + DAEMON;
        while self.virsh(&["list"]).is_err() {
            if Instant::now() > deadline {
                let said = fs::read_to_string(self.home.join("libvirtd.log")).unwrap_or_default();
                bail!("libvirtd does not come up: {said}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Ends the daemon; its domains run on.
    pub fn stop_daemon(&mut self) -> Result<()> {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill()?;
            daemon.wait()?;
            fs::remove_file(self.home.join("libvirtd.pid")).ok();
        }
        Ok(())
    }

    /// The process of a domain's QEMU, while it runs.
    pub fn qemu(&self, domain: &str) -> Option<u32> {
        let file = self.home.join(format!("run/qemu/{domain}.pid"));
        let pid: u32 = fs::read_to_string(file).ok()?.trim().parse().ok()?;
        Path::new(&format!("/proc/{pid}")).exists().then_some(pid)
    }

    /// Runs virsh and gives what it printed.
    pub fn virsh(&self, words: &[&str]) -> Result<String> {
        let output = Command::new("virsh")
            .args(["--connect", &self.uri()])
            .args(words)
            .stdin(Stdio::null())
            .output()
            .context("run virsh")?;
        if !output.status.success() {
            bail!(
                "virsh {words:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// A host of its own for libvirt, so that a guest can migrate from one daemon to another on one machine.
fn host_uuid(home: &Path) -> String {
    let mut hasher = DefaultHasher::new();
    home.hash(&mut hasher);
    let hash = hasher.finish();
    format!(
        "{:08x}-0000-4000-8000-{:012x}",
        hash >> 48,
        hash & 0xffff_ffff_ffff
    )
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        // They may have ended already.
        let _gone = self.holder.wait();
        if let Some(daemon) = &mut self.daemon {
            let _gone = daemon.kill();
            let _gone = daemon.wait();
        }
        let _gone = fs::remove_dir_all(&self.home);
    }
}
