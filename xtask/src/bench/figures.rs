//! What a run says, as Markdown for the documents: each block is a file, and `cargo xtask bench --publish` puts it
//! between the marks that name it. So no figure is ever typed.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result, ensure};

use super::{
    Variant,
    goal::GOALS,
    mode::Mode,
    results::{Results, Section},
    statistics::Median,
    work::Work,
};
use crate::build;

/// The work that the first tables show, in the variant with both ends on one CPU.
const MAIN: [Work; 5] = [Work::TcpRr, Work::TcpCrr, Work::UdpRr, Work::TcpStream, Work::VipTcpCrr];
/// What the README shows.
const SHORT: [Work; 4] = [Work::TcpRr, Work::TcpCrr, Work::UdpRr, Work::TcpStream];
/// The documents with marks, from the project's root.
const DOCUMENTS: [&str; 2] = ["docs/PERFORMANCE.md", "README.md"];
const END: &str = "<!-- end of figures -->";

/// Writes the blocks of a run's rates.
///
/// # Errors
///
/// Where a file cannot be written.
pub(super) fn write(results: &Results, out: &Path) -> Result<()> {
    if let Some(section) = results.sections.iter().find(|section| section.variant == Variant::OneCpu) {
        save(out, "rates", &rates(results, section))?;
        save(out, "goals", &goals(section))?;
        save(out, "summary", &summary(section))?;
    }
    save(out, "others", &others(results))
}

/// Writes one block; an empty one stands for nothing measured and leaves what is there.
///
/// # Errors
///
/// Where the file cannot be written.
pub(super) fn save(out: &Path, name: &str, block: &str) -> Result<()> {
    if block.is_empty() {
        return Ok(());
    }
    let directory = out.join("figures");
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let file = directory.join(format!("{name}.md"));
    fs::write(&file, block).with_context(|| file.display().to_string())
}

/// Puts the blocks below `out` into the documents, and the plot beside them.
///
/// # Errors
///
/// Where there is no block, or a mark has no end.
pub(super) fn publish(out: &Path) -> Result<()> {
    let root = build::root();
    let mut published = 0;
    for document in DOCUMENTS {
        let path = root.join(document);
        let text = fs::read_to_string(&path).with_context(|| document.to_owned())?;
        let (text, names) =
            filled(&text, |name| fs::read_to_string(out.join("figures").join(format!("{name}.md"))).ok())
                .with_context(|| document.to_owned())?;
        fs::write(&path, text).with_context(|| document.to_owned())?;
        published += names.len();
        println!("{document}: {}", names.join(", "));
    }
    ensure!(published > 0, "{} holds no figures: run the bench first", out.display());
    if out.join("plot.svg").is_file() {
        fs::copy(out.join("plot.svg"), root.join("docs/performance.svg")).context("docs/performance.svg")?;
        println!("docs/performance.svg");
    }
    Ok(())
}

/// The text with each marked block replaced by what `block` has for its name, and the names that were.
fn filled(text: &str, block: impl Fn(&str) -> Option<String>) -> Result<(String, Vec<String>)> {
    let (mut out, mut names, mut rest) = (String::new(), Vec::new(), text);
    while let Some(start) = rest.find("<!-- figures: ") {
        let (before, marked) = rest.split_at(start);
        let head = marked.find("-->").context("a mark is cut off")? + "-->".len();
        let end = marked.find(END).with_context(|| format!("no {END} behind {}", &marked[..head]))?;
        let name = marked["<!-- figures: ".len()..head - "-->".len()].trim();
        out.push_str(before);
        match block(name) {
            Some(block) => {
                let _ = write!(out, "{}\n{}\n", &marked[..head], block.trim_end());
                names.push(name.to_owned());
            }
            None => out.push_str(&marked[..end]),
        }
        out.push_str(END);
        rest = &marked[end + END.len()..];
    }
    out.push_str(rest);
    Ok((out, names))
}

/// The machine that runs this.
///
/// # Errors
///
/// Where the kernel does not tell.
pub(super) fn machine() -> Result<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let version = release.trim().split('.').take(2).collect::<Vec<_>>().join(".");
    let cpus = fs::read_to_string("/proc/cpuinfo")?;
    let models: Vec<_> = cpus.lines().filter_map(|line| line.strip_prefix("model name")).collect();
    let model = models.first().and_then(|line| line.split(':').nth(1)).unwrap_or("unknown kind").trim();
    Ok(format!("Linux {version}, {} CPUs: {model}", models.len()))
}

fn rates(results: &Results, section: &Section) -> String {
    let machine = machine().unwrap_or_else(|error| error.to_string());
    let mut text =
        format!("{machine}; both ends on one CPU, {} rounds of {} ms.\n", results.rounds, results.millis);
    for work in MAIN.into_iter().filter(|work| section.works().contains(work)) {
        let metric = work.metrics()[0];
        let _ = write!(
            text,
            "\n| {} | {} | CPU, µs/{} | to host | to direct | to flannel | resent |\n\
             | --- | ---: | ---: | --- | --- | --- | ---: |\n",
            metric.name,
            metric.unit,
            work.unit()
        );
        for mode in section.modes(work) {
            let value = number(section.value(work, mode, 0).value);
            let cpu = cpu(section, work, mode);
            let ratio = |to| section.ratio(work, mode, to, 0).map_or_else(String::new, interval);
            let [host, direct, flannel] = [Mode::Host, Mode::Direct, Mode::Flannel].map(ratio);
            let resent = resent(section, work, mode);
            let name = mode.name();
            let _ =
                writeln!(text, "| {name} | {value} | {cpu:.2} | {host} | {direct} | {flannel} | {resent} |");
        }
    }
    text.push_str(&times(section));
    text
}

/// What a transaction takes, in words.
fn times(section: &Section) -> String {
    let modes = [Mode::Host, Mode::Direct, Mode::Open, Mode::Strict, Mode::Flannel];
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

fn goals(section: &Section) -> String {
    let mut rows = String::new();
    let (mut reached, mut all) = (0, 0);
    for goal in GOALS {
        let Some(median) = goal.measured(section) else { continue };
        all += 1;
        let is_reached = median.value >= goal.least;
        reached += usize::from(is_reached);
        let _ = writeln!(
            rows,
            "| {}: {} to {} | {:.2} | {} | {} |",
            goal.work.metrics()[0].name,
            goal.mode.name(),
            goal.to.name(),
            goal.least,
            interval(median),
            if is_reached { "reached" } else { "**missed**" },
        );
    }
    if all == 0 {
        return rows;
    }
    format!("{reached} of {all} are reached:\n\n| | least | measured | |\n| --- | ---: | --- | --- |\n{rows}")
}

fn summary(section: &Section) -> String {
    let mut rows = String::new();
    for work in SHORT {
        let ratios = [(Mode::Open, Mode::Flannel), (Mode::Strict, Mode::Flannel), (Mode::Open, Mode::Host)]
            .map(|(mode, to)| section.ratio(work, mode, to, 0));
        if let [Some(open), Some(strict), Some(host)] = ratios {
            let name = work.metrics()[0].name;
            let _ =
                writeln!(rows, "| {name} | {:.2} | {:.2} | {:.2} |", open.value, strict.value, host.value);
        }
    }
    if rows.is_empty() {
        return rows;
    }
    format!(
        "| | open, to flannel | strict, to flannel | open, to the host's own sockets |\n\
         | --- | ---: | ---: | ---: |\n{rows}"
    )
}

/// A row for each metric that the first tables do not show.
fn others(results: &Results) -> String {
    const MODES: [Mode; 6] =
        [Mode::Host, Mode::Open, Mode::Strict, Mode::Kernel, Mode::Flannel, Mode::CiliumLike];
    let mut text = String::new();
    for section in &results.sections {
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
            "\n{}, {} rounds of {} ms:\n\n| | | {} | open to flannel | strict to flannel | resent |\n| --- | --- |{} --- | --- | ---: |\n",
            capitalised(section.variant.title()),
            results.rounds,
            results.millis,
            modes.iter().map(|mode| mode.name()).collect::<Vec<_>>().join(" | "),
            " ---: |".repeat(modes.len()),
        );
        for work in works {
            for (index, metric) in work.metrics().iter().enumerate() {
                let values = modes.iter().map(|mode| {
                    let value = section.value(work, *mode, index).value;
                    if value.is_nan() { String::new() } else { number(value) }
                });
                let values = values.collect::<Vec<_>>().join(" | ");
                let ratio =
                    |mode| section.ratio(work, mode, Mode::Flannel, index).map_or_else(String::new, interval);
                let resent: u64 = section.modes(work).iter().map(|mode| resent(section, work, *mode)).sum();
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

fn cpu(section: &Section, work: Work, mode: Mode) -> f64 {
    Median::of(section.samples(work, mode).iter().map(|sample| sample.cpu_micros).collect()).value
}

fn resent(section: &Section, work: Work, mode: Mode) -> u64 {
    section.samples(work, mode).iter().map(|sample| sample.retransmitted).sum()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marked_blocks_are_replaced_and_everything_else_stays() {
        let text = "a\n<!-- figures: one -->\nold\n<!-- end of figures -->\nb\n<!-- figures: two -->\nkept\n<!-- end of figures -->\nc\n";
        let block = |name: &str| (name == "one").then(|| "new\n".to_owned());
        let (out, names) = filled(text, block).expect("well marked");
        assert_eq!(out, text.replace("old", "new"));
        assert_eq!(names, ["one"]);
        let (again, _) = filled(&out, block).expect("well marked");
        assert_eq!(again, out, "publishing twice changes nothing");
    }

    #[test]
    fn a_mark_without_an_end_is_refused() {
        assert!(filled("<!-- figures: one -->\nold\n", |_| None).is_err());
    }

    #[test]
    fn the_documents_are_well_marked() {
        for (document, expected) in
            DOCUMENTS.into_iter().zip([&["rates", "goals", "others", "growth", "programs"][..], &["summary"]])
        {
            let text = fs::read_to_string(build::root().join(document)).expect(document);
            let (_, mut names) = filled(&text, |_| Some(String::new())).expect(document);
            names.sort_unstable();
            let mut expected = expected.to_vec();
            expected.sort_unstable();
            assert_eq!(names, expected, "{document}");
        }
    }
}
