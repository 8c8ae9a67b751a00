//! A store in memory that several actors share, each on a thread of its own, and that lets exactly one of them do its next operation:
//! whichever the schedule picks. An actor may be killed at any operation. Also the ways in which a test breaks the protocol, to see
//! that the model notices: they lie to an actor about what it lists or reorder what it writes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Condvar, Mutex};

use forerun::image::store::{Holder, ObjectWriter, Store, StoreLock};
use forerun::image::{BlockId, Error, Repository};

/// How the protocol is broken, when it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Broken {
    /// Not at all.
    Not,
    /// Writers see the condemned list of their first look for ever.
    NoLook,
    /// After it condemned, a prune sees the roots as they were before.
    NoSecondMark,
    /// Packs are deleted first, and the list is put then.
    CondemnedLate,
    /// A prune sees the points as they were before it listed the sessions.
    PointsFirst,
    /// Writers do not see that a base is gone.
    NoBaseCheck,
}

/// What an actor is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Role {
    Writer,
    Forget,
    Prune,
    Reader,
}

/// A small generator: the schedule needs many cheap numbers.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % end
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Actor {
    Running,
    Waiting,
    Ended,
}

struct Inner {
    objects: BTreeMap<String, Arc<Vec<u8>>>,
    locks: BTreeMap<String, String>,
    actors: Vec<Actor>,
    turn: Option<usize>,
    /// Actors that die at their next operation; `true`: it is done before.
    dying: BTreeMap<usize, bool>,
    dead: BTreeSet<usize>,
    steps: u64,
    failure: Option<String>,
    /// Blocks that must be readable, by whom they are promised to.
    promised: HashMap<String, Vec<BlockId>>,
    /// What changed, by whom.
    history: Vec<String>,
}

/// The store that all share.
pub(crate) struct World {
    inner: Mutex<Inner>,
    changed: Condvar,
    broken: Broken,
}

impl World {
    pub(crate) fn new(actors: usize, broken: Broken) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner {
                objects: BTreeMap::new(),
                locks: BTreeMap::new(),
                actors: vec![Actor::Running; actors],
                turn: None,
                dying: BTreeMap::new(),
                dead: BTreeSet::new(),
                steps: 0,
                failure: None,
                promised: HashMap::new(),
                history: Vec::new(),
            }),
            changed: Condvar::new(),
            broken,
        })
    }

    pub(crate) fn fail(&self, what: String) {
        self.inner.lock().unwrap().failure.get_or_insert(what);
    }

    /// A failure with its history, when that is asked for by `FORERUN_MODEL_TRACE`.
    pub(crate) fn told(&self, what: String) -> String {
        if std::env::var_os("FORERUN_MODEL_TRACE").is_none() {
            return what;
        }
        format!("{what}\n{}", self.inner.lock().unwrap().history.join("\n"))
    }

    pub(crate) fn failure(&self) -> Option<String> {
        self.inner.lock().unwrap().failure.clone()
    }

    /// Whether this is one of ten moments, or all have ended.
    pub(crate) fn is_tenth(&self) -> bool {
        let inner = self.inner.lock().unwrap();
        let ended = |actor: &Actor| *actor == Actor::Ended;
        inner.steps.is_multiple_of(10) || inner.actors.iter().all(ended)
    }

    pub(crate) fn promise(&self, to: &str, blocks: &[BlockId]) {
        let mut inner = self.inner.lock().unwrap();
        inner.history.push(format!("promised to {to}: {blocks:?}"));
        let promised = inner.promised.entry(to.to_owned()).or_default();
        promised.extend_from_slice(blocks);
    }

    pub(crate) fn release(&self, from: &str) {
        let mut inner = self.inner.lock().unwrap();
        inner.history.push(format!("released from {from}"));
        inner.promised.remove(from);
    }

    pub(crate) fn promised(&self) -> Vec<(String, Vec<BlockId>)> {
        let inner = self.inner.lock().unwrap();
        let all = inner.promised.iter();
        all.map(|(to, blocks)| (to.clone(), blocks.clone()))
            .collect()
    }

    /// Whether an actor was killed; it may begin anew.
    pub(crate) fn revive(&self, actor: usize) -> bool {
        self.inner.lock().unwrap().dead.remove(&actor)
    }

    pub(crate) fn is_dead(&self, actor: usize) -> bool {
        self.inner.lock().unwrap().dead.contains(&actor)
    }

    pub(crate) fn end(&self, actor: usize) {
        let mut inner = self.inner.lock().unwrap();
        inner.actors[actor] = Actor::Ended;
        if inner.turn == Some(actor) {
            inner.turn = None;
        }
        self.changed.notify_all();
    }

    /// Waits for the turn of an actor and does its operation.
    fn step<T>(
        &self,
        actor: Option<usize>,
        operation: impl FnOnce(&mut Inner) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut inner = self.inner.lock().unwrap();
        let Some(actor) = actor else {
            return operation(&mut inner);
        };
        let crashed = || Error::Io {
            action: "reach",
            object: "the store".into(),
            source: std::io::Error::other("killed"),
        };
        if inner.dead.contains(&actor) {
            return Err(crashed());
        }
        inner.actors[actor] = Actor::Waiting;
        if inner.turn == Some(actor) {
            inner.turn = None;
        }
        self.changed.notify_all();
        while inner.turn != Some(actor) {
            inner = self.changed.wait(inner).unwrap();
        }
        inner.actors[actor] = Actor::Running;
        match inner.dying.remove(&actor) {
            None => operation(&mut inner),
            Some(done) => {
                let result = done.then(|| operation(&mut inner));
                inner.dead.insert(actor);
                inner.history.push(format!("{actor} is killed, {done}"));
                // A lock lets go by the same mutex.
                drop(inner);
                drop(result);
                Err(crashed())
            }
        }
    }

    /// Runs the actors until all have ended. `between` is called after operations that may have taken something away.
    pub(crate) fn schedule(&self, mut dice: Dice, between: &dyn Fn()) {
        let mut checked = usize::MAX;
        let mut last = None;
        let mut quantum = 0;
        loop {
            let mut inner = self.inner.lock().unwrap();
            while inner.turn.is_some() || inner.actors.contains(&Actor::Running) {
                inner = self.changed.wait(inner).unwrap();
            }
            let gone = |name: &&String| {
                ["packs/", "maps/", "index/"]
                    .iter()
                    .any(|prefix| name.starts_with(prefix))
            };
            let there = inner.objects.keys().filter(gone).count();
            if there < checked && inner.failure.is_none() {
                drop(inner);
                between();
                inner = self.inner.lock().unwrap();
            }
            checked = there;
            let ready: Vec<usize> = (0..inner.actors.len())
                .filter(|actor| inner.actors[*actor] == Actor::Waiting)
                .collect();
            if ready.is_empty() {
                return;
            }
            inner.steps += 1;
            if inner.steps > 60_000 {
                inner.failure.get_or_insert("nobody gets on".into());
            }
            let next = match last {
                Some(last) if quantum > 0 && ready.contains(&last) => last,
                _ => {
                    quantum = [1, 2, 5, 20, 80, 400][dice.below(6) as usize];
                    quantum = dice.below(quantum) + 1;
                    ready[dice.below(ready.len() as u64) as usize]
                }
            };
            quantum -= 1;
            last = Some(next);
            // A failure ends everybody.
            let fatal = inner.failure.is_some() || (dice.below(400) == 0 && inner.steps < 3000);
            if fatal {
                let done = dice.below(2) == 0;
                inner.dying.insert(next, done);
            }
            inner.turn = Some(next);
            self.changed.notify_all();
        }
    }
}

/// The store as one actor sees it; nobody's sees all at once and is never scheduled.
#[derive(Clone)]
pub(crate) struct View {
    world: Arc<World>,
    actor: Option<usize>,
    role: Option<Role>,
    lies: Arc<Mutex<Lies>>,
}

#[derive(Default)]
struct Lies {
    listed: HashMap<String, Vec<String>>,
    condemned: bool,
    held_back: Vec<(String, Vec<u8>)>,
}

impl View {
    pub(crate) fn of(world: &Arc<World>, actor: usize, role: Role) -> Self {
        Self {
            world: Arc::clone(world),
            actor: Some(actor),
            role: Some(role),
            lies: Arc::default(),
        }
    }

    pub(crate) fn whole(world: &Arc<World>) -> Self {
        Self {
            world: Arc::clone(world),
            actor: None,
            role: None,
            lies: Arc::default(),
        }
    }

    pub(crate) fn open(&self) -> Result<Repository, Error> {
        Repository::open_store(Arc::new(self.clone()))
    }

    fn is(&self, role: Role, broken: Broken) -> bool {
        self.role == Some(role) && self.world.broken == broken
    }

    /// What a listing says to an actor of a broken protocol.
    fn lie(&self, inner: &Inner, prefix: &str) -> Option<Vec<String>> {
        let mut lies = self.lies.lock().unwrap();
        let now = |prefix: &str| list(inner, prefix);
        if self.is(Role::Writer, Broken::NoLook) && prefix == "condemned/" {
            let first = lies.listed.entry(prefix.into());
            return Some(first.or_insert_with(|| now(prefix)).clone());
        }
        if self.is(Role::Prune, Broken::NoSecondMark)
            && ["sessions/", "points/"]
                .iter()
                .any(|of| prefix.starts_with(of))
        {
            if lies.condemned {
                return Some(lies.listed.get(prefix).cloned().unwrap_or_default());
            }
            lies.listed.insert(prefix.into(), now(prefix));
        }
        if self.is(Role::Prune, Broken::PointsFirst) {
            if prefix == "sessions/" {
                let points = now("points/");
                lies.listed.entry("points/".into()).or_insert(points);
            } else if prefix == "points/" {
                return lies.listed.get(prefix).cloned();
            }
        }
        if self.is(Role::Writer, Broken::NoBaseCheck) && prefix == "points/" {
            let known = lies.listed.entry(prefix.into()).or_default();
            for name in now(prefix) {
                if !known.contains(&name) {
                    known.push(name);
                }
            }
            known.sort();
            return Some(known.clone());
        }
        None
    }

    fn put_now(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.world.step(self.actor, |inner| {
            put(inner, name, bytes)?;
            let note = format!("{:?} puts {name}", self.actor);
            inner.history.push(note);
            Ok(())
        })
    }
}

fn list(inner: &Inner, prefix: &str) -> Vec<String> {
    let from = inner.objects.range(prefix.to_owned()..);
    from.map(|(name, _)| name.clone())
        .take_while(|name| name.starts_with(prefix))
        .collect()
}

fn put(inner: &mut Inner, name: &str, bytes: &[u8]) -> Result<(), Error> {
    if inner.objects.contains_key(name) {
        return Err(Error::Exists {
            object: name.into(),
        });
    }
    inner.objects.insert(name.into(), Arc::new(bytes.to_vec()));
    Ok(())
}

fn get(inner: &Inner, name: &str) -> Result<Arc<Vec<u8>>, Error> {
    inner.objects.get(name).cloned().ok_or(Error::NotFound {
        object: name.into(),
    })
}

struct Writer {
    view: View,
    name: String,
    bytes: Vec<u8>,
}

impl ObjectWriter for Writer {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<(), Error> {
        self.view.put_now(&self.name, &self.bytes)
    }
}

struct Unlock(Arc<World>, String);

impl Drop for Unlock {
    fn drop(&mut self) {
        self.0.inner.lock().unwrap().locks.remove(&self.1);
    }
}

impl Store for View {
    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        if self.role == Some(Role::Prune) && name.starts_with("condemned/") {
            let mut lies = self.lies.lock().unwrap();
            lies.condemned = true;
            if self.world.broken == Broken::CondemnedLate && lies.held_back.is_empty() {
                lies.held_back.push((name.into(), bytes.to_vec()));
                return Ok(());
            }
        }
        self.put_now(name, bytes)
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>, Error> {
        Ok(Box::new(Writer {
            view: self.clone(),
            name: name.into(),
            bytes: Vec::new(),
        }))
    }

    fn get(&self, name: &str) -> Result<Vec<u8>, Error> {
        self.world.step(self.actor, |inner| {
            get(inner, name).map(|bytes| bytes.to_vec())
        })
    }

    fn get_range(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        // What never changes and is only read where it is needs no turn of its own, but for what may go meanwhile.
        let actor = self.actor.filter(|_| !name.starts_with("index/"));
        let bytes = self.world.step(actor, |inner| get(inner, name))?;
        let start = offset as usize;
        let range = bytes.get(start..start + buffer.len());
        buffer.copy_from_slice(range.ok_or(Error::Corrupt {
            object: name.into(),
            what: "short".into(),
        })?);
        Ok(())
    }

    fn size(&self, name: &str) -> Result<u64, Error> {
        let size = |inner: &mut Inner| get(inner, name).map(|bytes| bytes.len() as u64);
        self.world.step(None, size)
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>, Error> {
        self.world.step(self.actor, |inner| {
            Ok(self
                .lie(inner, prefix)
                .unwrap_or_else(|| list(inner, prefix)))
        })
    }

    fn list_fresh(&self, prefix: &str) -> Result<Vec<String>, Error> {
        self.list(prefix)
    }

    fn delete(&self, names: &[String]) -> Result<(), Error> {
        for name in names {
            self.world.step(self.actor, |inner| {
                inner.objects.remove(name);
                let note = format!("{:?} deletes {name}", self.actor);
                inner.history.push(note);
                Ok(())
            })?;
        }
        let packs = names.iter().any(|name| name.starts_with("packs/"));
        let held_back: Vec<_> = if packs {
            self.lies.lock().unwrap().held_back.drain(..).collect()
        } else {
            Vec::new()
        };
        held_back
            .iter()
            .try_for_each(|(name, bytes)| self.put_now(name, bytes))
    }

    fn lock(&self, name: &str, who: &str) -> Result<StoreLock, Error> {
        // Those who would sleep and try again do so without sleeping.
        let waits = name == "points" || (name == "index" && !who.starts_with("merging"));
        loop {
            let taken = self.world.step(self.actor, |inner| {
                if let Some(holder) = inner.locks.get(name) {
                    return Err(Error::Busy {
                        object: format!("locks/{name}"),
                        holder: Holder::words(holder),
                    });
                }
                let text = Holder::ourselves(who).to_text();
                inner.locks.insert(name.into(), text);
                Ok(StoreLock::new(Unlock(Arc::clone(&self.world), name.into())))
            });
            match taken {
                Err(Error::Busy { .. }) if waits && self.actor.is_some() => {}
                other => return other,
            }
        }
    }

    fn held(&self, prefix: &str) -> Result<Vec<(String, String)>, Error> {
        self.world.step(self.actor, |inner| {
            let held = inner.locks.iter();
            Ok(held
                .filter(|(name, _)| name.starts_with(prefix))
                .map(|(name, text)| (name.clone(), text.clone()))
                .collect())
        })
    }
}
