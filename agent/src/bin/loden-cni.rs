//! `loden-cni`: the CNI plugin, when a runtime calls it; for people, what installs it.

use std::process::ExitCode;

use loden_agent::cni;

fn main() -> ExitCode {
    // What is not UTF-8 is looked at all the same, so that it is refused and not passed over.
    let get = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    // A runtime sets the variable and gives no arguments; a person does the contrary.
    if get("CNI_COMMAND").is_some() && std::env::args_os().len() == 1 {
        cni::main(&get)
    } else {
        cni::install::main(std::env::args_os())
    }
}
