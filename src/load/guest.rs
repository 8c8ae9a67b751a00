//! What a guest feels: its requests (`query-blockstats`), and its CPUs by the host's scheduler. QEMU is asked only while a
//! batch holds its monitor; the CPUs' threads are in `/proc`.

use std::fs;

use qapi::qmp;
use serde_json::{Value, json};

use super::baseline::{Cpus, Requests};
use crate::qmp::command::{list, text};
use crate::qmp::{Monitor, Result};

/// As QEMU spells reads, writes and flushes.
const KINDS: [&str; 3] = ["rd", "wr", "flush"];

/// All requests of the guest's devices since QEMU was started; what goes through an export is not the guest's.
pub fn requests(monitor: &mut dyn Monitor) -> Result<Requests> {
    let devices = list::<qmp::query_blockstats>(monitor, json!({}))?;
    Ok(sum(&devices))
}

fn sum(devices: &[Value]) -> Requests {
    let mut sum = Requests::default();
    for device in devices
        .iter()
        .filter(|device| !text(device, "qdev").is_empty())
    {
        let stats = &device["stats"];
        let number = |key: String| stats[&key].as_u64().unwrap_or(0);
        for (kind, name) in KINDS.iter().enumerate() {
            sum.count[kind] += number(format!("{name}_operations"));
            sum.nanos[kind] += number(format!("{name}_total_time_ns"));
        }
    }
    sum
}

/// The threads of the virtual CPUs.
pub fn threads(monitor: &mut dyn Monitor) -> Result<Vec<i64>> {
    let cpus = list::<qmp::query_cpus_fast>(monitor, json!({}))?;
    let threads = cpus.iter().filter_map(|cpu| cpu.get("thread-id")?.as_i64());
    Ok(threads.collect())
}

/// How long these threads of a process have run, and waited for a CPU; `None` when that cannot be told.
#[must_use]
pub fn cpus(process: i32, threads: &[i64]) -> Option<Cpus> {
    let mut sum = Cpus::default();
    for thread in threads {
        let path = format!("/proc/{process}/task/{thread}/schedstat");
        let one = schedstat(&fs::read_to_string(path).ok()?)?;
        sum.ran += one.ran;
        sum.waited += one.waited;
    }
    (!threads.is_empty()).then_some(sum)
}

fn schedstat(text: &str) -> Option<Cpus> {
    let mut fields = text.split_ascii_whitespace();
    Some(Cpus {
        ran: fields.next()?.parse().ok()?,
        waited: fields.next()?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_through_an_export_is_not_the_guest_s() {
        let stats = json!({ "rd_operations": 2, "rd_total_time_ns": 30, "wr_operations": 5, "wr_total_time_ns": 70,
                            "flush_operations": 1, "flush_total_time_ns": 9 });
        let device =
            json!({ "qdev": "/machine/peripheral/vda/virtio-backend", "stats": stats.clone() });
        let export = json!({ "qdev": "", "stats": stats });
        let found = sum(&[device, export]);
        assert_eq!((found.count, found.nanos), ([2, 5, 1], [30, 70, 9]));
    }

    #[test]
    fn a_thread_that_is_gone_is_not_known() {
        let me = i32::try_from(std::process::id()).unwrap();
        assert!(cpus(me, &[i64::from(me)]).unwrap().ran > 0);
        assert_eq!(cpus(me, &[i64::from(me), 0]), None);
        assert_eq!(cpus(me, &[]), None);
    }
}
