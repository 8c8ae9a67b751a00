//! The steps at which a test kills a run, and which of them it takes.

#![allow(dead_code, reason = "no test file uses all of this")]

use std::collections::BTreeMap;
use std::time::Duration;

/// A step as `FORERUN_FAULT` names it.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    pub(crate) name: String,
    /// Whether a guard watches then.
    pub(crate) guarded: bool,
}

/// The steps that a run has logged, told from others of the same name.
pub(crate) fn named(log: &[String]) -> Vec<Step> {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let mut guarded = false;
    let mut steps = Vec::new();
    for name in log {
        let occurrence = seen.entry(name).or_default();
        *occurrence += 1;
        guarded |= name == "guard:start:after";
        guarded &= name != "guard:dismiss:after";
        let name = format!("{name}#{occurrence}");
        steps.push(Step { name, guarded });
    }
    steps
}

/// Whether a step can leave the VM, the repository or the host state other than the step before it: a query cannot.
fn changes(step: &Step) -> bool {
    let query = ["qmp:query-", "qmp:qom-", "qmp:x-debug-query-"];
    !query.iter().any(|query| step.name.starts_with(query))
}

/// Whether it asks a commit once more to end: that is asked until it has.
fn again(step: &Step) -> bool {
    let occurrence = step
        .name
        .split_once('#')
        .and_then(|(_, at)| at.parse().ok());
    step.name.starts_with("qmp:job-complete:") && occurrence.is_some_and(|at: u32| at > 2)
}

/// The steps between which something changes: of queries that follow each other the first stands for all.
pub(crate) fn states(steps: &[Step]) -> Vec<Step> {
    let steps: Vec<&Step> = steps.iter().filter(|step| !again(step)).collect();
    let changed = steps
        .windows(2)
        .filter(|pair| changes(pair[0]) || changes(pair[1]))
        .map(|pair| pair[1]);
    steps
        .first()
        .copied()
        .into_iter()
        .chain(changed)
        .cloned()
        .collect()
}

/// The deaths of a test: at every state until the guard's dismissal and a spread of the others, with the guard or without, in
/// turn. `FORERUN_KILL_ALL=1` asks for all steps, the guarded ones with both, `FORERUN_KILL_ONLY=blockdev-del` for those with
/// that in their names.
pub(crate) fn chosen(steps: &[Step], spread: usize) -> Vec<(Step, bool)> {
    let both = |step: &Step| [(step.clone(), false), (step.clone(), true)];
    if let Ok(only) = std::env::var("FORERUN_KILL_ONLY") {
        let named = steps.iter().filter(|step| step.name.contains(&only));
        return named.flat_map(both).collect();
    }
    if std::env::var_os("FORERUN_KILL_ALL").is_some_and(|all| all == "1") {
        let (guarded, others): (Vec<_>, Vec<_>) =
            steps.iter().cloned().partition(|step| step.guarded);
        let others = others
            .into_iter()
            .enumerate()
            .map(|(number, step)| (step, number % 2 == 1));
        return guarded.iter().flat_map(both).chain(others).collect();
    }
    let states = states(steps);
    let others = states.iter().filter(|step| !step.guarded).count();
    let every = others.div_ceil(spread).max(1);
    let mut other = 0;
    let mut chosen = Vec::new();
    for step in &states {
        other += usize::from(!step.guarded);
        if step.guarded || other % every == every / 2 {
            chosen.push((step.clone(), chosen.len() % 2 == 1));
        }
    }
    chosen
}

/// The shortest, the middle and the longest.
pub(crate) fn spread_of(sorted: &[Duration]) -> Option<(Duration, Duration, Duration)> {
    Some((*sorted.first()?, sorted[sorted.len() / 2], *sorted.last()?))
}
