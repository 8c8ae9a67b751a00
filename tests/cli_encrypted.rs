//! The program with encrypted repositories: where secrets come from, and that they go nowhere else.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by it"
)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const WORDS: &str = "correct horse battery staple";

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, content: &str, mode: u32) -> String {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path.display().to_string()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_forerun"));
        command
            .args(arguments)
            .current_dir(self.0.path())
            .stdin(Stdio::null())
            .env("FORERUN_STATE_DIR", self.path("state"))
            // What the machine of the tests is busy with is not theirs.
            .env("FORERUN_NO_LOAD_CONTROL", "1")
            .env("FORERUN_REPO", self.path("repo"))
            .env_remove("FORERUN_KEY_FILE")
            .env_remove("FORERUN_PASSPHRASE_FILE");
        command
    }

    /// Runs a command; gives its exit code and its JSON.
    fn run(&self, arguments: &[&str]) -> (i32, Value) {
        finish(&self.command(arguments).arg("--json").output().unwrap())
    }
}

fn finish(output: &Output) -> (i32, Value) {
    let json = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    for stream in [&output.stdout, &output.stderr] {
        let text = String::from_utf8_lossy(stream);
        assert!(!text.contains("horse"), "a secret is shown: {text}");
    }
    (output.status.code().unwrap(), json)
}

fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else {
            found.push(path);
        }
    }
}

fn holds(all: &[u8], what: &str) -> bool {
    all.windows(what.len())
        .any(|window| window == what.as_bytes())
}

#[test]
fn a_backup_of_an_image_is_encrypted_and_restored_with_the_key_file_only() {
    let place = Place::new();
    assert_eq!(place.run(&["key", "generate", "key"]).0, 0);
    let mode = std::fs::metadata(place.path("key"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(
        place.run(&["key", "generate", "key"]).0,
        1,
        "it was overwritten"
    );

    let init = [
        "init",
        "repo",
        "--encrypt",
        "--key-file",
        "key",
        "--compression",
        "zstd:1",
    ];
    let (code, report) = place.run(&init);
    assert_eq!(code, 0, "{report}");
    assert_eq!(report["repository"]["encrypted"], true);
    assert_eq!(report["repository"]["compression"], "zstd:1");

    let text = "a line that the guest wrote\n".repeat(40_000);
    let mut disk = text.into_bytes();
    disk.resize(2 << 20, 0);
    std::fs::write(place.path("web-disk.raw"), &disk).unwrap();
    let backup = [
        "backup",
        "disk:database0=web-disk.raw",
        "--as",
        "web-server",
        "--compression",
        "none",
    ];
    let (code, refused) = place.run(&backup);
    assert_eq!(code, 2, "{refused}");
    let with_key = |arguments: &[&str]| {
        let mut command = place.command(arguments);
        command
            .arg("--json")
            .env("FORERUN_KEY_FILE", place.path("key"));
        finish(&command.output().unwrap())
    };
    let (code, done) = with_key(&backup);
    assert_eq!(code, 0, "{done}");
    let (code, shown) = with_key(&["show", "web-server@latest"]);
    assert_eq!(code, 0, "{shown}");
    assert_eq!(place.run(&["list"]).0, 2);
    assert_eq!(place.run(&["verify", "--key-file", "key"]).0, 0);
    let restore = ["restore", "web-server@latest", "--output", "out"];
    std::fs::create_dir(place.path("out")).unwrap();
    assert_eq!(place.run(&restore).0, 2);
    let (code, restored) = with_key(&restore);
    assert_eq!(code, 0, "{restored}");
    assert!(std::fs::read(place.path("out/database0.raw")).unwrap() == disk);

    // To another encrypted repository, whose ids are others; its secret is not the environment's.
    assert_eq!(place.run(&["key", "generate", "key2"]).0, 0);
    let second = ["init", "second", "--encrypt", "--key-file", "key2"];
    assert_eq!(place.run(&second).0, 0);
    let copy = ["copy", "--all", "--to", "second"];
    let (code, asked) = with_key(&copy);
    assert_eq!(code, 2);
    assert!(asked.to_string().contains("--to-key-file"), "{asked}");
    let (code, copied) = with_key(&[&copy[..], &["--to-key-file", "key2"]].concat());
    assert_eq!(code, 0, "{copied}");
    let verify = ["verify", "--repo", "second", "--key-file", "key2"];
    let (code, verified) = place.run(&verify);
    assert_eq!(
        (code, &verified["verify"]["points"]),
        (0, &1.into()),
        "{verified}"
    );

    let key = std::fs::read(place.path("key")).unwrap();
    let mut found = Vec::new();
    files(&place.path("repo"), &mut found);
    assert!(found.len() > 5, "{found:?}");
    for path in found {
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend(path.display().to_string().bytes());
        // Long enough that chance does not make them.
        for known in ["the guest wrote", "web-server", "web-disk", "database0"] {
            assert!(!holds(&bytes, known), "{known} in {}", path.display());
        }
        assert!(!bytes.windows(32).any(|window| window == key));
    }
}

#[test]
fn keys_are_added_changed_and_removed_and_a_wrong_one_is_told_what_there_is() {
    let place = Place::new();
    let words = place.file("words", &format!("{WORDS}\r\nnot this line\n"), 0o600);
    let other = place.file("other", "horse and cart", 0o600);
    let init = [
        "init",
        "repo",
        "--encrypt",
        "--passphrase-file",
        &words,
        "--label",
        "first",
    ];
    let (code, made) = place.run(&init);
    assert_eq!(code, 0, "{made}");
    let list = |secret: &str| place.run(&["list", "--passphrase-file", secret]);
    assert_eq!(list(&words).0, 0);
    let (code, wrong) = list(&other);
    assert_eq!(code, 1);
    let shown = wrong.to_string();
    assert!(
        shown.contains("no key of the repository opens with this passphrase"),
        "{shown}"
    );
    assert!(shown.contains("(passphrase `first`)"), "{shown}");
    // Trailing blanks belong to a passphrase.
    let blank = place.file("blank", &format!("{WORDS} \n"), 0o600);
    assert_eq!(list(&blank).0, 1);

    assert_eq!(place.run(&["key", "generate", "file"]).0, 0);
    let add = [
        "key",
        "add",
        "--passphrase-file",
        &words,
        "--new-key-file",
        "file",
        "--label",
        "safe",
    ];
    let (code, added) = place.run(&add);
    assert_eq!(
        (code, &added["key"]["kind"]),
        (0, &"key file".into()),
        "{added}"
    );
    // What opens it already is not added once more.
    let (code, twice) = place.run(&add);
    assert_eq!(code, 1, "{twice}");
    let slot = format!(
        "key {} (key file `safe`) opens",
        added["key"]["id"].as_str().unwrap()
    );
    assert!(twice.to_string().contains(&slot), "{twice}");
    let same = [
        "key",
        "add",
        "--key-file",
        "file",
        "--new-passphrase-file",
        &words,
    ];
    let (code, twice) = place.run(&same);
    assert_eq!(code, 1, "{twice}");
    assert!(
        twice.to_string().contains("(passphrase `first`) opens"),
        "{twice}"
    );
    let (code, listed) = place.run(&["key", "list"]);
    assert_eq!((code, listed["keys"].as_array().unwrap().len()), (0, 2));

    let change = [
        "key",
        "change",
        "--passphrase-file",
        &words,
        "--new-passphrase-file",
        &other,
    ];
    let (code, changed) = place.run(&change);
    assert_eq!(
        (code, &changed["key"]["label"]),
        (0, &"first".into()),
        "{changed}"
    );
    assert_eq!((list(&words).0, list(&other).0), (1, 0));

    let remove = |key: &str| place.run(&["key", "remove", key, "--key-file", "file"]);
    assert_eq!(remove("no-such-key").0, 1);
    assert_eq!(remove("first").0, 0);
    assert_eq!(list(&other).0, 1);
    let (code, refused) = remove("safe");
    assert_eq!(code, 1);
    assert!(refused.to_string().contains("is the last one"), "{refused}");
    assert_eq!(place.run(&["list", "--key-file", "file"]).0, 0);
}

#[test]
fn a_secret_that_is_missing_needless_double_or_open_to_others_is_told() {
    let place = Place::new();
    let (code, asked) = place.run(&["init", "repo", "--encrypt"]);
    assert_eq!(code, 2, "{asked}");
    assert!(asked.to_string().contains("--key-file"), "{asked}");
    assert!(!place.path("repo").exists());

    let open = place.file("open", WORDS, 0o644);
    let needless = ["init", "repo", "--passphrase-file", &open];
    assert_eq!(place.run(&needless).0, 2);
    let short = place.file("short", "0123", 0o600);
    assert_eq!(
        place
            .run(&["init", "repo", "--encrypt", "--key-file", &short])
            .0,
        1
    );
    let empty = place.file("empty", "\n", 0o600);
    assert_eq!(
        place
            .run(&["init", "repo", "--encrypt", "--passphrase-file", &empty])
            .0,
        1
    );
    assert!(!place.path("repo").exists());

    let arguments = ["init", "repo", "--encrypt", "--passphrase-file", &open];
    let output = place.command(&arguments).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && words.contains("others may read"),
        "{words}"
    );

    // The command line goes before the environment, and a doubt is no choice.
    let mut command = place.command(&["list", "--passphrase-file", &open, "--json"]);
    command.env("FORERUN_KEY_FILE", &short);
    assert_eq!(finish(&command.output().unwrap()).0, 0);
    let mut command = place.command(&["list", "--json"]);
    command
        .env("FORERUN_KEY_FILE", &short)
        .env("FORERUN_PASSPHRASE_FILE", &open);
    assert_eq!(finish(&command.output().unwrap()).0, 2);

    // A key for a repository that says it is not encrypted.
    assert_eq!(place.run(&["init", "plain"]).0, 0);
    let (code, told) = place.run(&["list", "--repo", "plain", "--passphrase-file", &open]);
    assert_eq!(code, 1);
    assert!(told.to_string().contains("is not encrypted"), "{told}");
    assert_eq!(place.run(&["key", "list", "--repo", "plain"]).0, 1);
}
