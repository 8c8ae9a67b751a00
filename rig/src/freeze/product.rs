//! Freezes by the product's own command line: it backs up, it restores, and the restored pair is checked.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::stage::Stage;
use super::{Cell, Freezer, Method, Point, Product};
use crate::guest::Disk;

pub(super) struct ByProduct {
    product: Product,
    method: Method,
    target: String,
    repository: PathBuf,
    output: PathBuf,
    disks: Vec<Disk>,
}

impl ByProduct {
    pub(super) fn new(stage: &Stage, cell: &Cell, product: &Product) -> Result<Self> {
        let freezer = Self {
            product: product.clone(),
            method: cell.method,
            target: format!("qmp:{}", stage.dir().join("qmp.sock").display()),
            repository: stage.dir().join("repository"),
            output: stage.dir().join("restored"),
            disks: stage.disks.clone(),
        };
        freezer.run(
            Command::new(&product.program)
                .arg("init")
                .arg(&freezer.repository),
        )?;
        Ok(freezer)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.product.program);
        command.args(words).arg("--repo").arg(&self.repository);
        command
    }

    /// Its standard output; 3 is done with warnings.
    fn run(&self, command: &mut Command) -> Result<Vec<u8>> {
        let state = self.repository.with_file_name("state");
        command
            .args(&self.product.extra)
            .env("FORERUN_STATE_DIR", state);
        let output = command
            .output()
            .with_context(|| format!("run {command:?}"))?;
        if !matches!(output.status.code(), Some(0 | 3)) {
            let said = [output.stdout, output.stderr].concat();
            bail!(
                "{command:?}: {}: {}",
                output.status,
                String::from_utf8_lossy(&said)
            );
        }
        Ok(output.stdout)
    }

    fn restored(&self, which: usize) -> Result<Vec<u8>> {
        let path = self.output.join(format!("{}.raw", self.disks[which].id()));
        std::fs::read(&path).with_context(|| format!("read {}", path.display()))
    }
}

impl Freezer for ByProduct {
    fn point(&mut self, stage: &mut Stage, number: u32) -> Result<Option<Point>> {
        if number % 2 == 1 {
            self.run(&mut self.command(&["precopy", &self.target, "--once"]))?;
        }
        let method = match self.method {
            Method::Fleece => "fleece",
            Method::Snapshot => "snapshot",
        };
        let completed = stage.completed();
        let started = Instant::now();
        let words = [
            "backup",
            &self.target,
            "--freeze",
            method,
            "--quiesce",
            "never",
            "--json",
        ];
        let json = self.run(&mut self.command(&words))?;
        let took = started.elapsed();
        let bounds = stage.bounds(completed);
        let report: Value = serde_json::from_slice(&json).context("the JSON of a backup")?;
        let point = &report["targets"][0]["point"];
        let id = point["id"]
            .as_str()
            .with_context(|| format!("no targets[0].point.id in {report}"))?;
        remove(&self.output)?;
        let output = self.output.display().to_string();
        self.run(&mut self.command(&["restore", id, "--output", &output, "--format", "raw"]))?;
        let images = [self.restored(0)?, self.restored(1)?];
        remove(&self.output)?;
        let ms = |key: &str| point[key].as_u64().map(Duration::from_millis);
        Ok(Some(Point {
            images,
            transaction: ms("freeze_ms").unwrap_or_default(),
            released: ms("released_ms").unwrap_or(took),
            residual: point["bytes"]["residual"].as_u64().unwrap_or(0),
            bounds,
        }))
    }
}

fn remove(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}
