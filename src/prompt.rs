//! A question on the terminal whose answer is not shown.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};

use anyhow::{Context, Result};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

use crate::exit::{Failure, Kind};

/// The longest answer.
const LIMIT: usize = 4096;

/// The terminal of a person who can be asked; `None` in scripts and services.
pub(crate) fn terminal() -> Option<File> {
    if !std::io::stdin().is_terminal() {
        return None;
    }
    File::options().read(true).write(true).open("/dev/tty").ok()
}

/// Puts the terminal back as it was.
struct Restore<'a>(&'a File, Termios);

impl Drop for Restore<'_> {
    fn drop(&mut self) {
        tcsetattr(self.0, OptionalActions::Flush, &self.1).ok();
    }
}

/// Asks on a terminal. Keys come one by one, also those that are signals otherwise, so that no signal leaves the terminal
/// silent.
pub(crate) fn ask(mut terminal: &File, question: &str) -> Result<Zeroizing<Vec<u8>>> {
    let modes = tcgetattr(terminal).context("look at the terminal")?;
    let mut silent = modes.clone();
    silent.local_modes -= LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG;
    let restore = Restore(terminal, modes);
    tcsetattr(terminal, OptionalActions::Flush, &silent).context("silence the terminal")?;
    write!(terminal, "{question}: ").context("ask on the terminal")?;
    let answer = read_line(terminal);
    drop(restore);
    writeln!(terminal).context("write to the terminal")?;
    answer
}

fn read_line(mut terminal: &File) -> Result<Zeroizing<Vec<u8>>> {
    // Never grows: a longer buffer would leave a copy of the answer behind.
    let mut line = Zeroizing::new(Vec::with_capacity(LIMIT));
    loop {
        let mut key = [0];
        match terminal.read(&mut key) {
            Ok(0) => return Ok(line),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("read from the terminal"),
        }
        match key[0] {
            // The last is control-D.
            b'\r' | b'\n' | 0x04 => return Ok(line),
            // Control-C and control-backslash.
            0x03 | 0x1c => return Err(Failure::plain(Kind::Interrupted, "interrupted")),
            // Control-U.
            0x15 => line.clear(),
            0x08 | 0x7f => erase(&mut line),
            _ if line.len() >= LIMIT => {
                let message = format!("a passphrase has at most {LIMIT} bytes");
                return Err(Failure::plain(Kind::Usage, message));
            }
            byte => line.push(byte),
        }
    }
}

/// Takes away the last character, which may have several bytes.
fn erase(line: &mut Vec<u8>) {
    while line.pop().is_some_and(|byte| byte & 0xc0 == 0x80) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

    /// Types into a terminal that is asked; gives the answer, what was shown, and whether the terminal echoes again.
    fn typed(keys: &[u8]) -> (Result<Zeroizing<Vec<u8>>>, String, bool) {
        let keyboard = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&keyboard).unwrap();
        unlockpt(&keyboard).unwrap();
        let name = ptsname(&keyboard, Vec::new())
            .unwrap()
            .into_string()
            .unwrap();
        let flags = i32::try_from(rustix::fs::OFlags::NOCTTY.bits()).unwrap();
        let terminal = {
            use std::os::unix::fs::OpenOptionsExt;
            let mut options = File::options();
            options.read(true).write(true).custom_flags(flags);
            options.open(name).unwrap()
        };
        let mut keyboard = File::from(keyboard);
        let answer = std::thread::scope(|scope| {
            let asked = scope.spawn(|| ask(&terminal, "word"));
            // What is typed before the question is thrown away.
            let mut shown = [0; 6];
            keyboard.read_exact(&mut shown).unwrap();
            assert_eq!(&shown, b"word: ");
            keyboard.write_all(keys).unwrap();
            asked.join().unwrap()
        });
        let mut shown = [0; 64];
        let length = keyboard.read(&mut shown).unwrap();
        let shown = String::from_utf8_lossy(&shown[..length]).into_owned();
        let modes = tcgetattr(&terminal).unwrap().local_modes;
        (answer, shown, modes.contains(LocalModes::ECHO))
    }

    #[test]
    fn what_is_typed_is_heard_and_not_shown() {
        let (answer, shown, echoes) = typed("wrong\x15op\u{e9}\x7fen\r".as_bytes());
        assert_eq!(*answer.unwrap(), b"open");
        assert_eq!(shown, "\r\n");
        assert!(echoes);
    }

    #[test]
    fn an_interrupt_leaves_the_terminal_as_it_was() {
        let (answer, shown, echoes) = typed(b"open\x03");
        let failure = answer.unwrap_err();
        assert_eq!(crate::exit::classify(&failure).0, Kind::Interrupted);
        assert_eq!((shown.as_str(), echoes), ("\r\n", true));
    }
}
