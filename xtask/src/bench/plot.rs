//! The plot for the README: how fast each mode is, as a part of what the host itself reaches.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::{
    mode::Mode,
    plan::{Family, Variant},
    results::Section,
    work::Work,
};

/// Pixels.
const SIZE: (u32, u32) = (860, 420);
/// What is shown, and under which name.
const GROUPS: [(Work, &str); 4] = [
    (Work::TcpRr, "TCP_RR"),
    (Work::TcpCrr, "TCP_CRR"),
    (Work::UdpRr, "UDP_RR"),
    (Work::TcpStream, "TCP stream"),
];
/// The modes, each in a colour of its own that differs in lightness too (after Okabe and Ito).
const BARS: [(Mode, &str, RGBColor); 7] = [
    (Mode::HostRules, "host with the same rules", RGBColor(51, 51, 51)),
    (Mode::Direct, "direct: no encapsulation", RGBColor(153, 153, 153)),
    (Mode::Open, "Loden, open gate", RGBColor(0, 114, 178)),
    (Mode::Strict, "Loden, strict gate", RGBColor(86, 180, 233)),
    (Mode::CiliumLike, "Cilium-like", RGBColor(0, 158, 115)),
    (Mode::HostGw, "host-gw", RGBColor(230, 159, 0)),
    (Mode::Flannel, "flannel", RGBColor(213, 94, 0)),
];
/// Room of one group; bars of one unit, the rest between groups.
const PITCH: f64 = BARS.len() as f64 + 1.5;

/// Draws the section with both ends on one CPU, where it has anything to show.
///
/// # Errors
///
/// Where the file cannot be written.
pub(super) fn draw(sections: &[Section], file: &Path) -> Result<()> {
    let main = (Family::V4, Variant::OneCpu);
    let section = sections.iter().find(|section| (section.family, section.variant) == main);
    let Some(section) = section else { return Ok(()) };
    let bars = bars(section);
    if bars.is_empty() {
        return Ok(());
    }
    paint(&bars, file).map_err(|error| anyhow!("{}: {error}", file.display()))
}

/// One bar: where it begins, how high it is, between what the true median lies, and its mode.
#[derive(Debug)]
struct Bar {
    left: f64,
    value: f64,
    low: f64,
    high: f64,
    mode: usize,
}

fn bars(section: &Section) -> Vec<Bar> {
    let mut bars = Vec::new();
    for (group, (work, _)) in GROUPS.iter().enumerate() {
        for (index, (mode, ..)) in BARS.iter().enumerate() {
            if let Some(ratio) = section.ratio(*work, *mode, Mode::Host, 0) {
                let left = group as f64 * PITCH + index as f64;
                bars.push(Bar { left, value: ratio.value, low: ratio.low, high: ratio.high, mode: index });
            }
        }
    }
    bars
}

fn paint(bars: &[Bar], file: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::new(file, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let top = bars.iter().map(|bar| bar.high).fold(1.0, f64::max) * 1.05;
    let right = GROUPS.len() as f64 * PITCH - 0.5;
    // The names of the modes stand beside the bars.
    let legend = 7.0;
    let mut chart = ChartBuilder::on(&area)
        .caption("sockets in the host itself = 1; more is better; both ends on one CPU", ("sans-serif", 15))
        .margin(10)
        .x_label_area_size(25)
        .y_label_area_size(40)
        .build_cartesian_2d(-1.0..right + legend, 0.0..top)?;
    chart.configure_mesh().disable_x_mesh().disable_x_axis().y_labels(6).light_line_style(WHITE).draw()?;
    chart.draw_series([PathElement::new([(-1.0, 1.0), (right, 1.0)], BLACK.mix(0.6))])?;
    for (index, (_, name, colour)) in BARS.iter().enumerate() {
        let own = || bars.iter().filter(move |bar| bar.mode == index);
        let boxes =
            own().map(|bar| Rectangle::new([(bar.left, 0.0), (bar.left + 0.9, bar.value)], colour.filled()));
        chart
            .draw_series(boxes)?
            .label(*name)
            .legend(|(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled()));
        let middle = |bar: &Bar| bar.left + 0.45;
        chart.draw_series(
            own().map(|bar| PathElement::new([(middle(bar), bar.low), (middle(bar), bar.high)], BLACK)),
        )?;
        chart.draw_series(own().map(|bar| {
            Text::new(
                format!("{:.2}", bar.value),
                (bar.left, 0.06),
                ("sans-serif", 11).into_font().color(&WHITE),
            )
        }))?;
    }
    let style = ("sans-serif", 14).into_font();
    for (group, (_, name)) in GROUPS.iter().enumerate() {
        let at = (group as f64 * PITCH + 1.5, -0.02 * top);
        chart.plotting_area().draw(&Text::new(*name, at, style.clone()))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    area.present()?;
    Ok(())
}
