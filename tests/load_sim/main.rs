//! The controller in virtual time, against a model of a disk that a guest and we share: what it may cost the guest, that it
//! does not swing, that it comes back, and that it never starves.
#![allow(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a test may panic, and a model is not exact"
)]

mod model;
mod plot;

use forerun::load::config::{Config, Urgency};
use model::{Dice, MIB, Run, World, run};

/// How soon a rise of the guest's load must be answered, seconds: a look a second, and a step down.
const REACTION: f64 = 4.0;

/// A load that is this between two times, and nothing else.
fn between(from: f64, to: f64, load: f64) -> impl Fn(f64) -> f64 {
    move |at| {
        if (from..to).contains(&at) { load } else { 0.0 }
    }
}

fn step_world() -> World {
    World::new(between(60.0, 240.0, 0.3))
}

fn ramp_world() -> World {
    World::new(|at| (at / 300.0).min(1.0) * 0.7)
}

fn burst_world() -> World {
    World::new(|at| if at % 60.0 < 10.0 { 0.5 } else { 0.05 })
}

fn noisy_world() -> World {
    let mut dice = Dice(7);
    let mut level = 0.3;
    let levels: Vec<f64> = (0..1200)
        .map(|_| {
            level = (level + 0.05 * dice.roll()).clamp(0.1, 0.6);
            level
        })
        .collect();
    World {
        noise: 0.5,
        ..World::new(move |at| levels[(at as usize).min(1199)])
    }
}

fn day_world() -> World {
    World {
        tick: 0.25,
        ..World::new(|at| {
            let hour = at / 3600.0;
            let day = ((hour - 13.0) / 24.0 * std::f64::consts::TAU)
                .cos()
                .max(0.0);
            0.02 + 0.6 * day
        })
    }
}

fn stalling_world() -> World {
    World {
        repository: Box::new(|at| {
            if (60.0..90.0).contains(&at) {
                0.0
            } else {
                150.0 * MIB
            }
        }),
        ..World::new(|_| 0.0)
    }
}

fn slow_disk_world() -> World {
    World {
        disk: 30.0 * MIB,
        ..World::new(between(60.0, 240.0, 0.4))
    }
}

/// What a run promises whatever the world does.
fn keeps_its_word(name: &str, run: &Run, share: f64) {
    let (at, worst) = run.worst_minute(REACTION);
    assert!(
        worst <= share,
        "{name}: {worst:.3} more latency in the minute before {at:.0} s"
    );
    let minutes = run.points.last().unwrap().at / 60.0;
    let turns = run.reversals();
    assert!(
        turns as f64 <= 4.0 + 6.0 * minutes,
        "{name}: the pace turned {turns} times"
    );
}

#[test]
fn an_idle_guest_on_an_idle_host_is_copied_at_full_speed_within_a_second() {
    let run = run(&World::new(|_| 0.0), &Config::default(), 120.0);
    let full = 0.97 * 400.0 * MIB;
    assert!(run.speed(1.0, 2.0) > 0.99 * full);
    assert!(
        run.speed(1.0, 120.0) > 0.96 * full,
        "{}",
        run.speed(1.0, 120.0) / full
    );
}

#[test]
fn no_faster_than_the_schedule_needs() {
    let config = Config {
        needed: Some(20 << 20),
        ..Config::default()
    };
    let calm = run(&World::new(|_| 0.0), &config, 120.0);
    let speed = calm.speed(1.0, 120.0) / MIB;
    assert!((19.0..=20.1).contains(&speed), "{speed} MiB/s");
    // What the guest does not bear is not done because there is time.
    let step = run(&step_world(), &config, 360.0);
    keeps_its_word("step with a schedule", &step, 0.10);
    assert!(step.speed(0.0, 360.0) < 20.1 * MIB);
}

#[test]
fn a_step_of_load_is_answered_and_its_end_too() {
    let run = run(&step_world(), &Config::default(), 360.0);
    keeps_its_word("step", &run, 0.10);
    let full = 0.97 * 400.0 * MIB;
    assert!(run.speed(30.0, 60.0) > 0.9 * full);
    // What keeps 10 % more latency is 0.09 of what the guest leaves.
    assert!(
        run.speed(120.0, 240.0) > 0.3 * 0.09 * 0.7 * 400.0 * MIB,
        "starved: {}",
        run.speed(120.0, 240.0) / MIB
    );
    assert!(
        run.speed(270.0, 360.0) > 0.9 * full,
        "{}",
        run.speed(270.0, 360.0) / MIB
    );
}

#[test]
fn a_ramp_is_followed_down() {
    let run = run(&ramp_world(), &Config::default(), 600.0);
    keeps_its_word("ramp", &run, 0.10);
    assert!(run.speed(400.0, 600.0) > MIB, "starved");
}

#[test]
fn bursts_cost_no_more_than_their_reaction() {
    let run = run(&burst_world(), &Config::default(), 900.0);
    keeps_its_word("bursts", &run, 0.10);
    assert!(
        run.speed(60.0, 900.0) > 5.0 * MIB,
        "{}",
        run.speed(60.0, 900.0) / MIB
    );
}

#[test]
fn noise_is_not_taken_for_our_doing() {
    let run = run(&noisy_world(), &Config::default(), 1200.0);
    // What is measured is off by half here, and what is believed of it by little.
    keeps_its_word("noise", &run, 0.12);
    assert!(
        run.speed(60.0, 1200.0) > 4.0 * MIB,
        "starved: {}",
        run.speed(60.0, 1200.0) / MIB
    );
}

#[test]
fn days_and_nights() {
    let run = run(&day_world(), &Config::default(), 86400.0);
    keeps_its_word("day", &run, 0.10);
    let hour = 3600.0;
    let (night, noon) = (
        run.speed(hour, 5.0 * hour),
        run.speed(12.0 * hour, 14.0 * hour),
    );
    assert!(
        night > 1.2 * noon && noon > MIB,
        "{} {}",
        night / MIB,
        noon / MIB
    );
}

#[test]
fn dead_sensors_make_it_careful_and_not_still() {
    let config = Config::default();
    // Nothing of the guest: the host's pressure while we copy counts.
    let blind = World {
        guest_seen: false,
        ..step_world()
    };
    let blind = run(&blind, &config, 360.0);
    assert!(blind.speed(10.0, 60.0) > MIB);
    assert!(blind.speed(70.0, 240.0) < 0.5 * 400.0 * MIB);
    // Nothing at all: slower than with eyes, and not at full speed at once.
    let dark = World {
        guest_seen: false,
        host_seen: false,
        ..World::new(|_| 0.0)
    };
    let dark = run(&dark, &config, 120.0);
    assert!(
        dark.speed(0.0, 5.0) < 0.9 * 400.0 * MIB,
        "{}",
        dark.speed(0.0, 5.0) / MIB
    );
    assert!(dark.copied > 120.0 * MIB);
    // Nothing of the host: the guest's latency is enough.
    let host = World {
        host_seen: false,
        ..step_world()
    };
    keeps_its_word("no host", &run(&host, &config, 360.0), 0.10);
}

#[test]
fn a_repository_that_stalls_is_waited_for() {
    let run = run(&stalling_world(), &Config::default(), 180.0);
    assert!(run.speed(60.1, 90.0) < 1.0);
    assert!(run.speed(95.0, 180.0) > 0.9 * 150.0 * MIB);
}

#[test]
fn a_slow_disk_is_left_to_the_guest() {
    let run = run(&slow_disk_world(), &Config::default(), 360.0);
    keeps_its_word("slow disk", &run, 0.10);
    assert!(
        run.speed(300.0, 360.0) > 0.8 * 30.0 * MIB,
        "{}",
        run.speed(300.0, 360.0) / MIB
    );
}

#[test]
fn a_deadline_is_kept_when_it_can_be() {
    let soft = World {
        work: 4096.0 * MIB,
        ..World::new(|_| 0.3)
    };
    let done = run(&soft, &Config::default(), 600.0);
    assert!(done.finished.is_some(), "{} MiB", done.copied / MIB);
    keeps_its_word("deadline", &done, 0.10);
    // A hard one overrides the guest, by no more than it needs.
    let hard = World {
        work: 40960.0 * MIB,
        ..World::new(|_| 0.3)
    };
    let needed = (40960.0 * MIB / 600.0) as u64;
    let config = Config {
        urgency: Urgency::Hard(needed + needed / 20),
        ..Config::default()
    };
    let done = run(&hard, &config, 600.0);
    assert!(done.finished.is_some(), "{} MiB", done.copied / MIB);
    let soft = run(&hard, &Config::default(), 600.0);
    assert!(soft.finished.is_none(), "without it the guest wins");
}

#[test]
fn permanent_load_does_not_starve_it() {
    for (load, cpu, least) in [(0.5, 0.1, 4.0), (0.3, 0.97, 1.0), (0.9, 0.1, 0.1)] {
        let world = World {
            cpu: Box::new(move |_| cpu),
            ..World::new(move |_| load)
        };
        let run = run(&world, &Config::default(), 1800.0);
        keeps_its_word("permanent", &run, 0.10);
        let speed = run.speed(60.0, 1800.0) / MIB;
        assert!(speed > least, "load {load}, cpu {cpu}: {speed} MiB/s");
    }
}

#[test]
fn a_busy_cpu_does_not_keep_it_stopped() {
    let speed = |cpu: f64| {
        let world = World {
            cpu: Box::new(move |_| cpu),
            ..World::new(between(60.0, 70.0, 0.95))
        };
        let run = run(&world, &Config::default(), 100.0);
        keeps_its_word("busy CPU", &run, 0.10);
        run.speed(72.0, 100.0) / MIB
    };
    let (idle, busy) = (speed(0.1), speed(0.75));
    assert!(busy > idle / 4.0, "{busy} MiB/s instead of {idle}");
}

#[test]
fn busy_hours_and_the_rate_are_ceilings() {
    let config = Config {
        rate: Some(100 << 20),
        busy_hours: vec![
            "00:02-00:03=20MiB/s".parse().unwrap(),
            "00:03-00:04=0".parse().unwrap(),
        ],
        ..Config::default()
    };
    let run = run(&World::new(|_| 0.0), &config, 300.0);
    let fastest = |from, to| {
        let within = run
            .points
            .iter()
            .filter(|point| (from..to).contains(&point.at));
        within.map(|point| point.speed).fold(0.0, f64::max)
    };
    assert!(
        fastest(1.0, 120.0) <= 100.0 * MIB,
        "{}",
        fastest(1.0, 120.0) / MIB
    );
    assert!(
        run.speed(5.0, 119.0) > 90.0 * MIB,
        "{}",
        run.speed(5.0, 119.0) / MIB
    );
    assert!(fastest(120.2, 180.0) <= 20.0 * MIB && run.speed(121.0, 179.0) > 18.0 * MIB);
    assert!(fastest(180.2, 240.0) < 1.0);
    assert!(run.speed(245.0, 300.0) > 90.0 * MIB);
}

/// Draws the runs into `docs/load/`; by hand.
#[test]
#[ignore = "writes the plots of the documentation"]
fn plots() {
    let worlds = [
        ("step", "A step of load", step_world(), 360.0),
        ("burst", "Bursts", burst_world(), 360.0),
        ("noise", "A noisy guest", noisy_world(), 600.0),
        ("day", "A day", day_world(), 86400.0),
        ("slow-disk", "A slow disk", slow_disk_world(), 360.0),
        ("stall", "A repository that stalls", stalling_world(), 180.0),
    ];
    for (name, title, world, seconds) in worlds {
        let run = run(&world, &Config::default(), seconds);
        plot::write(name, title, &run);
    }
}
