//! `cargo xtask build-ebpf`: the object as the agent's build script makes it, and what the verifier says to it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use aya::{Ebpf, EbpfLoader, programs::Program};
use aya_obj::Object;
use loden_tests::bpffs::Bpffs;

use crate::{build, table::table};

/// Builds the object, copies it to `target/bpf/loden-programs.o`, and prints a row for each program.
///
/// # Errors
///
/// Where it does not build, or where a program does not pass the verifier for another reason than privileges.
pub(crate) fn run() -> Result<()> {
    let object = build::Agent::build()?.programs;
    let data = fs::read(&object).with_context(|| object.display().to_string())?;
    let rows = programs(&data)?;
    let verified = verify(&data);
    let mut table = table(["program", "section", "instructions", "verifier processed"], 2);
    for (name, (section, instructions)) in &rows {
        let processed = match &verified {
            Ok(counts) => counts.get(name).map_or_else(|| "?".to_owned(), u32::to_string),
            Err(_) => "-".to_owned(),
        };
        table.add_row([name.clone(), section.clone(), instructions.to_string(), processed]);
    }
    println!("{table}");
    println!("{}", copy(&object)?.display());
    match verified {
        Ok(_) => Ok(()),
        Err(error) if !nix::unistd::geteuid().is_root() => {
            println!("not loaded, for that takes root: {error:#}");
            Ok(())
        }
        Err(error) => Err(error.context("the kernel does not take the programs")),
    }
}

/// Section and number of instructions of each program in the object.
fn programs(data: &[u8]) -> Result<BTreeMap<String, (String, usize)>> {
    let object = Object::parse(data).context("not an object with BPF programs")?;
    let section = |program: &aya_obj::Program| match program.section {
        aya_obj::ProgramSection::SchedClassifier => "classifier".to_owned(),
        aya_obj::ProgramSection::Xdp { .. } => "xdp".to_owned(),
        ref other => format!("{other:?}"),
    };
    let instructions = |program: &aya_obj::Program| {
        object.functions.get(&program.function_key()).map_or(0, |function| function.instructions.len())
    };
    Ok(object
        .programs
        .iter()
        .map(|(name, program)| (name.clone(), (section(program), instructions(program))))
        .collect())
}

/// Loads every program, attaches none, and returns how many instructions the verifier went through.
fn verify(data: &[u8]) -> Result<BTreeMap<String, u32>> {
    let path = std::env::temp_dir().join(format!("loden-build-ebpf-{}", std::process::id()));
    // Maps that are pinned by name go there, never to the pins of an agent that runs on this machine.
    let pins = Bpffs::mount(&path)?;
    let mut ebpf = EbpfLoader::new().default_map_pin_directory(pins.path()).load(data)?;
    let loaded = load_all(&mut ebpf);
    drop(ebpf);
    loaded
}

fn load_all(ebpf: &mut Ebpf) -> Result<BTreeMap<String, u32>> {
    let mut counts = BTreeMap::new();
    for (name, program) in ebpf.programs_mut() {
        match program {
            Program::SchedClassifier(classifier) => classifier.load(),
            Program::Xdp(xdp) => xdp.load(),
            other => anyhow::bail!("{name} is a {:?}: teach build-ebpf to load it", other.prog_type()),
        }
        .with_context(|| name.to_owned())?;
        counts.insert(name.to_owned(), program.info()?.verified_instruction_count().unwrap_or(0));
    }
    Ok(counts)
}

fn copy(object: &Path) -> Result<PathBuf> {
    let directory = build::root().join("target/bpf");
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let to = directory.join("loden-programs.o");
    fs::copy(object, &to).with_context(|| to.display().to_string())?;
    Ok(to)
}
