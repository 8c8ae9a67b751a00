//! The paths of UNIX sockets. An address has room for 107 bytes; a state directory may be deeper than that.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// The longest path that fits an address (unix(7)).
const LONGEST: usize = 107;

/// A path of a socket that fits an address: its own, or by way of its directory's descriptor.
#[derive(Debug)]
pub struct ShortPath {
    path: PathBuf,
    /// Keeps the path valid.
    _directory: Option<OwnedFd>,
}

impl ShortPath {
    /// Shortens a path when it is too long; its directory must be there.
    pub fn of(path: &Path) -> io::Result<Self> {
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(Self::as_it_is(path));
        };
        if path.as_os_str().len() <= LONGEST {
            return Ok(Self::as_it_is(path));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(directory, flags, Mode::empty())?;
        let through = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string());
        Ok(Self {
            path: through.join(name),
            _directory: Some(directory),
        })
    }

    fn as_it_is(path: &Path) -> Self {
        Self {
            path: path.to_path_buf(),
            _directory: None,
        }
    }

    /// What to connect to or to listen on.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Connects without waiting: a server whose queue of clients is full answers with [`std::io::ErrorKind::WouldBlock`]. The
/// stream stays non-blocking.
pub fn connect_now(path: &Path) -> std::io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let short = ShortPath::of(path)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(short.path())?)?;
    Ok(UnixStream::from(socket))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::ShortPath;

    #[test]
    fn a_socket_in_a_deep_directory_is_reached() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("d".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let path = deep.join("socket");
        let _listener = UnixListener::bind(ShortPath::of(&path).unwrap().path()).unwrap();
        UnixStream::connect(ShortPath::of(&path).unwrap().path()).unwrap();
        assert!(path.exists());
    }
}
