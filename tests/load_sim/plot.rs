//! A run as a picture: three panels over time, plain SVG.

use std::fmt::Write as _;
use std::path::Path;

use crate::model::{MIB, Point, Run};

const WIDTH: f64 = 720.0;
const PANEL: f64 = 110.0;
const GAP: f64 = 26.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 40.0;
/// Points of a line.
const COLUMNS: usize = 600;

struct Line<'a> {
    color: &'a str,
    value: &'a dyn Fn(&Point) -> f64,
}

struct Panel<'a> {
    title: &'a str,
    unit: &'a str,
    lines: Vec<Line<'a>>,
}

/// Writes `docs/load/NAME.svg`.
pub(crate) fn write(name: &str, title: &str, run: &Run) {
    let panels = [
        Panel {
            title: "the guest's load on the disk",
            unit: "%",
            lines: vec![Line {
                color: "#888888",
                value: &|point| point.load * 100.0,
            }],
        },
        Panel {
            title: "what is copied",
            unit: "MiB/s",
            lines: vec![Line {
                color: "#1f77b4",
                value: &|point| point.speed / MIB,
            }],
        },
        Panel {
            title: "the guest's latency: with us (red), without us (green)",
            unit: "ms",
            lines: vec![
                Line {
                    color: "#d62728",
                    value: &|point| point.latency * 1e3,
                },
                Line {
                    color: "#2ca02c",
                    value: &|point| point.alone * 1e3,
                },
            ],
        },
    ];
    let count = f64::from(u8::try_from(panels.len()).unwrap());
    let height = TOP + count * (PANEL + GAP) + 10.0;
    let mut svg = String::new();
    // The name of the format, which nobody connects to.
    let format = ["http", "://www.w3.org/2000/svg"].concat();
    writeln!(
        svg,
        "<svg xmlns=\"{format}\" viewBox=\"0 0 {} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"18\" font-size=\"14\">{title}</text>",
        LEFT + WIDTH + 20.0
    )
    .unwrap();
    for (number, panel) in (0_u8..).zip(&panels) {
        let top = TOP + f64::from(number) * (PANEL + GAP);
        draw(&mut svg, panel, run, top);
    }
    let seconds = run.points.last().unwrap().at;
    let (end, unit) = if seconds > 7200.0 {
        (seconds / 3600.0, "h")
    } else {
        (seconds, "s")
    };
    writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"{0}\">0</text><text x=\"{1}\" y=\"{0}\" text-anchor=\"end\">{end:.0} {unit}</text>\n</svg>",
        height - 18.0,
        LEFT + WIDTH
    )
    .unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/load");
    std::fs::create_dir_all(&path).unwrap();
    #[allow(clippy::disallowed_methods, reason = "a picture need not be durable")]
    std::fs::write(path.join(format!("{name}.svg")), svg).unwrap();
}

fn draw(svg: &mut String, panel: &Panel<'_>, run: &Run, top: f64) {
    let each = run.points.len().div_ceil(COLUMNS);
    let most = panel
        .lines
        .iter()
        .flat_map(|line| run.points.iter().map(line.value));
    let most = most.fold(0.0, f64::max).max(1e-9);
    writeln!(
        svg,
        "<rect x=\"{LEFT}\" y=\"{top}\" width=\"{WIDTH}\" height=\"{PANEL}\" fill=\"none\" stroke=\"#cccccc\"/>\n\
         <text x=\"{LEFT}\" y=\"{}\">{}</text>\n\
         <text x=\"{}\" y=\"{}\" text-anchor=\"end\">{most:.1} {}</text>",
        top - 4.0,
        panel.title,
        LEFT - 5.0,
        top + 10.0,
        panel.unit
    )
    .unwrap();
    for line in &panel.lines {
        let points: Vec<String> = run
            .points
            .chunks(each)
            .enumerate()
            .map(|(column, points)| {
                let mean = points.iter().map(line.value).sum::<f64>() / points.len() as f64;
                let x = LEFT + column as f64 * each as f64 / run.points.len() as f64 * WIDTH;
                format!("{x:.1},{:.1}", top + PANEL * (1.0 - mean / most))
            })
            .collect();
        writeln!(
            svg,
            "<polyline fill=\"none\" stroke=\"{}\" points=\"{}\"/>",
            line.color,
            points.join(" ")
        )
        .unwrap();
    }
}
