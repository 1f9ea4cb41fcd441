//! What the results say, as Markdown for the documents: `cargo xtask bench --publish` puts each block between the marks
//! that name it. So no figure is ever typed.

mod tables;

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result, ensure};

use super::{
    RATES, growth, plot, programs,
    results::{Section, Stored},
};
use crate::build;

/// The documents with marks, from the project's root.
const DOCUMENTS: [&str; 2] = ["docs/PERFORMANCE.md", "README.md"];
const END: &str = "<!-- end of figures -->";

/// Puts what the results below `out` say into the documents, and the plot beside them. What was not measured stays as it
/// is there.
///
/// # Errors
///
/// Where there are no results, or a mark has no end.
pub(super) fn publish(out: &Path) -> Result<()> {
    let blocks = blocks(out)?;
    ensure!(!blocks.is_empty(), "{} holds no results: run the bench first", out.display());
    let root = build::root();
    for document in DOCUMENTS {
        let path = root.join(document);
        let text = fs::read_to_string(&path).with_context(|| document.to_owned())?;
        let (text, names) =
            filled(&text, |name| blocks.get(name).cloned()).with_context(|| document.to_owned())?;
        fs::write(&path, text).with_context(|| document.to_owned())?;
        println!("{document}: {}", names.join(", "));
    }
    if let Some(stored) = Stored::<Vec<Section>>::load(&out.join(RATES))? {
        plot::draw(&stored.results, &root.join("docs/performance.svg"))?;
        println!("docs/performance.svg");
    }
    Ok(())
}

/// The blocks by name, of whatever was measured.
fn blocks(out: &Path) -> Result<BTreeMap<&'static str, String>> {
    let mut blocks = BTreeMap::new();
    if let Some(stored) = Stored::<Vec<Section>>::load(&out.join(RATES))? {
        blocks.extend(tables::of_rates(&stored.results, &stored.origin.machine));
    }
    if let Some(stored) = Stored::<Vec<growth::Row>>::load(&out.join(growth::FILE))? {
        blocks.insert("growth", growth::block(&stored));
    }
    if let Some(stored) = Stored::<Vec<programs::Row>>::load(&out.join(programs::FILE))? {
        blocks.insert("programs", tables::of_programs(&stored));
    }
    blocks.retain(|_, block| !block.is_empty());
    Ok(blocks)
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
        for (document, expected) in DOCUMENTS.into_iter().zip([
            &["rates", "goals", "others", "ipv6", "services", "notrack", "growth", "programs"][..],
            &["summary"],
        ]) {
            let text = fs::read_to_string(build::root().join(document)).expect(document);
            let (_, mut names) = filled(&text, |_| Some(String::new())).expect(document);
            names.sort_unstable();
            let mut expected = expected.to_vec();
            expected.sort_unstable();
            assert_eq!(names, expected, "{document}");
        }
    }
}
