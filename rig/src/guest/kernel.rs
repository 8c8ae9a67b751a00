//! Where the guests' kernel, its modules, the agent and the guest program come from: a cache under `target/guest`.
//!
//! What is missing is fetched (by `scripts/lib/packages.sh`) or built, by one process at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The cache of what guests are made of: `FORERUN_RIG_CACHE`, else `target/guest` of the workspace.
pub fn cache_dir() -> PathBuf {
    let default = || workspace().join("target/guest");
    std::env::var_os("FORERUN_RIG_CACHE").map_or_else(default, PathBuf::from)
}

/// Held while something is fetched or built into the cache.
pub(super) fn lock() -> Result<File> {
    fs::create_dir_all(cache_dir())?;
    let file = File::options()
        .create(true)
        .append(true)
        .open(cache_dir().join("lock"))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
    Ok(file)
}

fn fetch(function: &str, dir: &Path) -> Result<()> {
    let script = workspace().join("scripts/lib/packages.sh");
    let output = Command::new("bash")
        .args(["-c", r#". "$1" && "$2" "$3""#, "bash"])
        .args([script.as_os_str(), function.as_ref(), dir.as_os_str()])
        .output()?;
    if !output.status.success() {
        bail!("{function}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// A kernel and its modules.
#[derive(Debug)]
pub(super) struct Kernel {
    dir: PathBuf,
}

/// The guests' kernel, fetched when it is not there.
pub(super) fn kernel() -> Result<Kernel> {
    let dir = cache_dir().join("kernel");
    let _one_at_a_time = lock()?;
    fetch("fetch_guest_kernel", &dir)?;
    Ok(Kernel { dir })
}

/// The root with `qemu-ga` and its libraries, fetched when it is not there.
pub(super) fn agent_root() -> Result<PathBuf> {
    let dir = cache_dir().join("agent");
    let _one_at_a_time = lock()?;
    fetch("fetch_guest_agent", &dir)?;
    Ok(dir.join("root"))
}

/// The root disk of a guest with systemd, made when it is not there.
pub(super) fn system_root() -> Result<PathBuf> {
    let dir = cache_dir().join("system");
    let _one_at_a_time = lock()?;
    fetch("fetch_guest_system", &dir)?;
    Ok(dir.join("root.qcow2"))
}

/// The static program for the guest: `FORERUN_RIG_GUEST`, else built here. Cargo decides whether it has to be built again.
pub(super) fn guest_program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("FORERUN_RIG_GUEST") {
        return Ok(path.into());
    }
    let dir = cache_dir().join("build");
    let _one_at_a_time = lock()?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "build",
            "--quiet",
            "--release",
            "--locked",
            "--no-default-features",
            "--bin",
            "rig-guest",
        ])
        .args(["--target", TARGET, "--manifest-path"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&dir)
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .output()
        .context("run cargo for the guest program")?;
    if !output.status.success() {
        bail!(
            "build the guest program: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(dir.join(TARGET).join("release/rig-guest"))
}

impl Kernel {
    pub(super) fn image(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// The modules with these names and all that they need, as (file name, content), in the order of loading. A name that the
    /// kernel does not have as a module is taken to be built in.
    pub(super) fn modules(&self, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut files = BTreeMap::new();
        find_modules(&self.dir.join("modules"), &mut files)?;
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            load(name, &files, &mut seen, &mut order)?;
        }
        Ok(order)
    }
}

fn find_modules(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let entry = entry?;
        let (path, kind) = (entry.path(), entry.file_type()?);
        if kind.is_dir() {
            find_modules(&path, files)?;
        } else if let Some((stem, _)) = entry.file_name().to_string_lossy().split_once(".ko") {
            files.insert(stem.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// Depth first: what a module's own `depends=` says comes before it.
fn load(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    seen: &mut BTreeSet<String>,
    order: &mut Vec<(String, Vec<u8>)>,
) -> Result<()> {
    let name = name.replace('-', "_");
    let Some(path) = files.get(&name) else {
        return Ok(());
    };
    if !seen.insert(name.clone()) {
        return Ok(());
    }
    let data = unpacked(path)?;
    for needed in depends(&data) {
        load(&needed, files, seen, order)?;
    }
    order.push((format!("{name}.ko"), data));
    Ok(())
}

fn unpacked(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "ko") {
        return Ok(fs::read(path)?);
    }
    let tool = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => "gzip",
    };
    let output = Command::new(tool).arg("-dc").arg(path).output()?;
    if !output.status.success() {
        return Err(anyhow!("{tool} cannot unpack {}", path.display()));
    }
    Ok(output.stdout)
}

fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let list: Vec<u8> = module[at + KEY.len()..]
        .iter()
        .copied()
        .take_while(|byte| *byte != 0)
        .collect();
    let list = String::from_utf8_lossy(&list).into_owned();
    list.split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}
