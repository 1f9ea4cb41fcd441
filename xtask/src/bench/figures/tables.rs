//! The blocks as tables.

use std::fmt::Write as _;

use super::super::{
    goal::GOALS,
    mode::Mode,
    plan::{Family, Variant},
    programs,
    results::{Section, Stored},
    statistics::Median,
    work::Work,
};

/// The work that the first tables show, in the variant with both ends on one CPU.
const MAIN: [Work; 5] = [Work::TcpRr, Work::TcpCrr, Work::UdpRr, Work::TcpStream, Work::VipTcpCrr];
/// What the README shows, and what is shown of both families.
const SHORT: [Work; 4] = [Work::TcpRr, Work::TcpCrr, Work::UdpRr, Work::TcpStream];
/// The modes whose nodes differ from others' in their rules alone: they have a table of their own.
const RULED: [Mode; 6] = [
    Mode::Flannel0,
    Mode::Flannel1000,
    Mode::Flannel5000,
    Mode::Open5000,
    Mode::Strict5000,
    Mode::StrictNotrack,
];

/// All blocks of rates by their names; those of what was not measured are empty.
pub(super) fn of_rates(sections: &[Section], machine: &str) -> Vec<(&'static str, String)> {
    let find = |family| {
        let wanted = (family, Variant::OneCpu);
        sections.iter().find(move |section| (section.family, section.variant) == wanted)
    };
    let mut blocks = vec![("goals", goals(sections)), ("others", others(sections))];
    if let Some(main) = find(Family::V4) {
        blocks.extend([
            ("rates", rates(main, machine)),
            ("summary", summary(main)),
            ("services", services(main)),
            ("notrack", notrack(main)),
        ]);
    }
    if let Some(section) = find(Family::V6) {
        blocks.push(("ipv6", ipv6(section, find(Family::V4))));
    }
    blocks
}

/// What each program takes, by mode and work.
pub(super) fn of_programs(stored: &Stored<Vec<programs::Row>>) -> String {
    let mut text = format!(
        "{}.\n\n| | mode | work | `from_pod` | `from_wire` |\n| --- | --- | --- | ---: | ---: |\n",
        stored.origin.machine
    );
    for row in stored.results.iter().filter(|row| row.variant == Variant::OneCpu) {
        let mean = |name: &str| row.means.get(name).map_or_else(String::new, |mean| format!("{mean:.0}"));
        let (from_pod, from_wire) = (mean("from_pod"), mean("from_wire"));
        let (family, mode, work) = (row.family.title(), row.mode.name(), row.work.metrics()[0].name);
        let _ = writeln!(text, "| {family} | {mode} | {work} | {from_pod} | {from_wire} |");
    }
    text
}

fn rates(section: &Section, machine: &str) -> String {
    let mut text = format!("{machine}; {}, {}.\n", section.variant.title(), section.extent());
    for work in MAIN.into_iter().filter(|work| section.works().contains(work)) {
        let metric = work.metrics()[0];
        let _ = write!(
            text,
            "\n| {} | {} | CPU, µs/{} | to host | to host-rules | to redirect | to direct | to flannel | resent |\n\
             | --- | ---: | ---: | --- | --- | --- | --- | --- | ---: |\n",
            metric.name,
            metric.unit,
            work.unit()
        );
        for mode in section.modes(work).into_iter().filter(|mode| !RULED.contains(mode)) {
            let value = number(section.value(work, mode, 0).value);
            let cpu = section.cpu_micros(work, mode);
            let ratio = |to| section.ratio(work, mode, to, 0).map_or_else(String::new, interval);
            let bases = [Mode::Host, Mode::HostRules, Mode::Redirect, Mode::Direct, Mode::Flannel];
            let ratios = bases.map(ratio).join(" | ");
            let resent = section.resent(work, mode);
            let _ = writeln!(text, "| {} | {value} | {cpu:.2} | {ratios} | {resent} |", mode.name());
        }
    }
    text.push_str(&times(section));
    text
}

/// What a transaction takes, in words.
fn times(section: &Section) -> String {
    use Mode::{Direct, Flannel, Host, HostRules, Open, Redirect, Strict};
    let modes = [Host, HostRules, Redirect, Direct, Open, Strict, Flannel];
    let micros = |mode: Mode| {
        let rate = section.value(Work::TcpRr, mode, 0).value;
        (rate > 0.0).then(|| format!("{:.1} µs {}", 1e6 / rate, mode.name()))
    };
    let times: Vec<String> = modes.into_iter().filter_map(micros).collect();
    if times.is_empty() {
        return String::new();
    }
    format!("\nOn one CPU the time of a transaction is its cost. A TCP_RR takes: {}.\n", times.join(", "))
}

fn goals(sections: &[Section]) -> String {
    let mut rows = String::new();
    let (mut reached, mut all) = (0, 0);
    for (goal, section) in GOALS.iter().flat_map(|goal| sections.iter().map(move |section| (goal, section))) {
        let Some(median) = goal.measured(section) else { continue };
        all += 1;
        let is_reached = median.value >= goal.least;
        reached += usize::from(is_reached);
        let _ = writeln!(
            rows,
            "| {} | {:.2} | {} | {} | {} | {} |",
            goal.title(),
            goal.least,
            interval(median),
            if is_reached { "reached" } else { "**missed**" },
            goal.bound(section).map_or_else(String::new, interval),
            goal.beside_rules(section).map_or_else(String::new, interval),
        );
    }
    if all == 0 {
        return rows;
    }
    format!(
        "{reached} of {all} are reached:\n\n\
         | | least | measured | | redirect to the same | to host-rules |\n\
         | --- | ---: | --- | --- | --- | --- |\n{rows}"
    )
}

fn summary(section: &Section) -> String {
    let mut rows = String::new();
    for work in SHORT {
        let ratios = [
            (Mode::Open, Mode::Flannel),
            (Mode::Strict, Mode::Flannel),
            (Mode::Open, Mode::HostRules),
            (Mode::Open, Mode::Host),
        ];
        let ratio = |(mode, to)| Some(format!("{:.2}", section.ratio(work, mode, to, 0)?.value));
        if let Some(ratios) = ratios.into_iter().map(ratio).collect::<Option<Vec<_>>>() {
            let _ = writeln!(rows, "| {} | {} |", work.metrics()[0].name, ratios.join(" | "));
        }
    }
    if rows.is_empty() {
        return rows;
    }
    format!(
        "| | open, to flannel | strict, to flannel | open, to the host's own sockets | the same without any rule |\n\
         | --- | ---: | ---: | ---: | ---: |\n{rows}"
    )
}

/// A row for each metric that the first tables do not show; rates with a unit's CPU time, µs, in brackets.
fn others(sections: &[Section]) -> String {
    const MODES: [Mode; 6] =
        [Mode::Host, Mode::Open, Mode::Strict, Mode::Kernel, Mode::Flannel, Mode::CiliumLike];
    let mut text = String::new();
    for section in sections.iter().filter(|section| section.family == Family::V4) {
        let shown = |work: &Work| section.variant != Variant::OneCpu || !MAIN.contains(work);
        let works: Vec<Work> = section.works().into_iter().filter(shown).collect();
        let modes: Vec<Mode> = MODES
            .into_iter()
            .filter(|mode| works.iter().any(|work| section.modes(*work).contains(mode)))
            .collect();
        if works.is_empty() {
            continue;
        }
        let _ = write!(
            text,
            "\n{}, {}:\n\n| | | {} | open to flannel | strict to flannel | resent |\n| --- | --- |{} --- | --- | ---: |\n",
            capitalised(section.variant.title()),
            section.extent(),
            modes.iter().map(|mode| mode.name()).collect::<Vec<_>>().join(" | "),
            " ---: |".repeat(modes.len()),
        );
        for work in works {
            for (index, metric) in work.metrics().iter().enumerate() {
                let values = modes.iter().map(|mode| {
                    let value = section.value(work, *mode, index).value;
                    match (value.is_nan(), metric.is_cost) {
                        (true, _) => String::new(),
                        (_, true) => number(value),
                        _ => format!("{} ({:.2})", number(value), section.cpu_micros(work, *mode)),
                    }
                });
                let values = values.collect::<Vec<_>>().join(" | ");
                let ratio =
                    |mode| section.ratio(work, mode, Mode::Flannel, index).map_or_else(String::new, interval);
                let resent: u64 = modes.iter().map(|mode| section.resent(work, *mode)).sum();
                let _ = writeln!(
                    text,
                    "| {} | {} | {values} | {} | {} | {resent} |",
                    metric.name,
                    metric.unit,
                    ratio(Mode::Open),
                    ratio(Mode::Strict),
                );
            }
        }
    }
    text
}

/// Both families' rates, and how IPv6 compares with its own.
fn ipv6(section: &Section, ipv4: Option<&Section>) -> String {
    let mut text = format!(
        "{}, {}:\n\n| | | unit | IPv4 | IPv6 | CPU, µs | to host | to direct | to flannel | resent |\n\
         | --- | --- | --- | ---: | ---: | ---: | --- | --- | --- | ---: |\n",
        capitalised(section.variant.title()),
        section.extent(),
    );
    for work in SHORT.into_iter().filter(|work| section.works().contains(work)) {
        let metric = work.metrics()[0];
        for mode in section.modes(work) {
            let value = |section: &Section| section.value(work, mode, 0).value;
            let [host, direct, flannel] = [Mode::Host, Mode::Direct, Mode::Flannel]
                .map(|to| section.ratio(work, mode, to, 0).map_or_else(String::new, interval));
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {:.2} | {host} | {direct} | {flannel} | {} |",
                metric.name,
                mode.name(),
                metric.unit,
                ipv4.map(value).filter(|value| value.is_finite()).map_or_else(String::new, number),
                number(value(section)),
                section.cpu_micros(work, mode),
                section.resent(work, mode),
            );
        }
    }
    text
}

/// What many services in the nodes' rules change.
fn services(section: &Section) -> String {
    let modes = [
        Mode::Flannel0,
        Mode::Flannel,
        Mode::Flannel1000,
        Mode::Flannel5000,
        Mode::Open,
        Mode::Open5000,
        Mode::Strict,
        Mode::Strict5000,
    ];
    by_mode(section, &modes, &[Mode::Flannel, Mode::Flannel5000])
}

/// What conntrack for the outer packets costs.
fn notrack(section: &Section) -> String {
    by_mode(section, &[Mode::Strict, Mode::StrictNotrack], &[Mode::Flannel, Mode::Strict])
}

/// A row for each of these modes in work that opens connections, and TCP_RR; empty where the last was not measured.
fn by_mode(section: &Section, modes: &[Mode], bases: &[Mode]) -> String {
    let works = [Work::TcpRr, Work::TcpCrr, Work::VipTcpCrr];
    if !modes.last().is_some_and(|mode| section.modes(Work::TcpCrr).contains(mode)) {
        return String::new();
    }
    let heads: Vec<String> = bases.iter().map(|base| format!("to {}", base.name())).collect();
    let mut text = format!(
        "| | | 1/s | {} |\n| --- | --- | ---: |{}\n",
        heads.join(" | "),
        " --- |".repeat(bases.len())
    );
    for work in works {
        for &mode in modes.iter().filter(|mode| section.modes(work).contains(mode)) {
            let ratio = |to: &Mode| section.ratio(work, mode, *to, 0).map_or_else(String::new, interval);
            let ratios = bases.iter().map(ratio).collect::<Vec<_>>().join(" | ");
            let value = number(section.value(work, mode, 0).value);
            let _ = writeln!(text, "| {} | {} | {value} | {ratios} |", work.metrics()[0].name, mode.name());
        }
    }
    text
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

fn number(value: f64) -> String {
    if value < 1000.0 { format!("{value:.2}") } else { format!("{value:.0}") }
}

fn interval(Median { value, low, high }: Median) -> String {
    format!("{value:.2} [{low:.2} {high:.2}]")
}
