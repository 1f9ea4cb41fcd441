//! `loden-cni install`: puts the plugin and its configuration where a container runtime looks for them.
//!
//! Files are replaced by a rename, so that a runtime finds the old or the new one, whole. A configuration that an
//! operator has written or changed is never replaced without being told to: beside each one that is installed stands
//! a copy under a name that no runtime reads, and what differs from that copy is the operator's.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, ErrorKind, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Parser;
use serde_json::Value;

use super::{flannel, request::VERSIONS, routed};

/// The configuration where none is given: routed pods, with host ports.
const DEFAULT_CONF: &str = r#"{
  "name": "loden",
  "cniVersion": "1.0.0",
  "plugins": [
    { "type": "loden-cni", "capabilities": { "bandwidth": true } },
    { "type": "portmap", "capabilities": { "portMappings": true } }
  ]
}
"#;

/// What a person can ask of the plugin's binary.
#[derive(Debug, Parser)]
#[command(
    name = "loden-cni",
    version,
    about = "Loden's CNI plugin: routed pods, or flannel's plugin",
    max_term_width = 110
)]
enum Cli {
    /// Put the plugin and its configuration where a container runtime looks for them
    Install(Install),
}

/// The flags of `loden-cni install`.
#[derive(Debug, clap::Args)]
pub struct Install {
    /// Where runtimes look for plugins
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    pub bin_dir: PathBuf,

    /// Where runtimes look for configurations; they take the first by name
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    pub conf_dir: PathBuf,

    /// The configuration to install; without it, one of routed pods with host ports
    #[arg(long, value_name = "FILE")]
    pub conf: Option<PathBuf>,

    /// The name to install it under
    #[arg(long, value_name = "NAME", default_value = "10-loden.conflist")]
    pub conf_name: String,

    /// Install no configuration
    #[arg(long, conflicts_with_all = ["conf", "conf_name"])]
    pub no_conf: bool,

    /// Install the plugin as `flannel` too, so that flannel's configuration finds it; a plugin that is there is kept as
    /// flannel.before-loden
    #[arg(long)]
    pub flannel: bool,

    /// Replace a configuration that was written or changed by somebody else; it is kept as NAME.before-loden
    #[arg(long)]
    pub force: bool,
}

/// Does what the arguments say.
#[must_use]
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    if args.len() < 2 {
        eprintln!(
            "loden-cni {}: a CNI plugin, called by container runtimes; speaks {}. To install it: loden-cni install --help",
            env!("CARGO_PKG_VERSION"),
            VERSIONS.join(", ")
        );
        return ExitCode::FAILURE;
    }
    let Cli::Install(install) = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    match install.run() {
        Ok(done) => {
            done.iter().for_each(|line| println!("{line}"));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("loden-cni: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Why something was not installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A flag or the configuration is wrong.
    #[error("{0}")]
    Wrong(String),
    /// Somebody else's configuration is in the place.
    #[error(
        "{} was written or changed by somebody else and stays; remove it, install under another --conf-name, or replace it with --force",
        .0.display()
    )]
    Theirs(PathBuf),
}

impl Install {
    /// Installs. Says what was done, one line a file. The configuration comes last: a runtime that reads it finds the
    /// plugin.
    ///
    /// # Errors
    ///
    /// Where a file cannot be written, the configuration is wrong, or somebody else's is in the place.
    pub fn run(&self) -> Result<Vec<String>, InstallError> {
        let conf = self.configuration()?;
        if let Some((_, path)) = &conf {
            self.may_replace(path)?;
        }
        let own = fs::read("/proc/self/exe").map_err(failed(Path::new("/proc/self/exe")))?;
        let mut done = vec![put_binary(&self.bin_dir.join(routed::TYPE), &own)?];
        if self.flannel {
            let path = self.bin_dir.join(flannel::TYPE);
            if fs::read(&path).is_ok_and(|there| !is_ours(&there)) {
                done.push(set_aside(&path)?);
            }
            done.push(put_binary(&path, &own)?);
        }
        if let Some((content, path)) = conf {
            if self.force && matches!(self.may_replace_unforced(&path), Err(InstallError::Theirs(_))) {
                done.push(set_aside(&path)?);
            }
            put(&path, &content, 0o644)?;
            put(&copy_of(&path), &content, 0o644)?;
            done.push(format!("{} installed", path.display()));
        }
        Ok(done)
    }

    /// The configuration and where it goes.
    fn configuration(&self) -> Result<Option<(Vec<u8>, PathBuf)>, InstallError> {
        if self.no_conf {
            return Ok(None);
        }
        let name = &self.conf_name;
        let known = [".conflist", ".conf", ".json"].iter().any(|end| name.ends_with(end));
        if name.contains('/') || name.starts_with('.') || !known {
            return Err(InstallError::Wrong(format!(
                "--conf-name={name} must be a file name that ends in .conflist, .conf or .json: runtimes read no other"
            )));
        }
        let content = match &self.conf {
            None => DEFAULT_CONF.as_bytes().to_vec(),
            Some(path) => fs::read(path).map_err(failed(path))?,
        };
        let shown = self.conf.as_deref().unwrap_or(Path::new("the default")).display().to_string();
        let wrong = |why: String| InstallError::Wrong(format!("--conf={shown}: {why}"));
        let value: Value =
            serde_json::from_slice(&content).map_err(|error| wrong(format!("it is not JSON: {error}")))?;
        if value["name"].as_str().is_none_or(str::is_empty) {
            return Err(wrong("it has no \"name\"".to_owned()));
        }
        // A runtime that cannot read the first configuration has none at all.
        if name.ends_with(".conflist") && value["plugins"].as_array().is_none_or(Vec::is_empty) {
            return Err(wrong("it has no \"plugins\", as a .conflist must".to_owned()));
        }
        Ok(Some((content, self.conf_dir.join(name))))
    }

    fn may_replace(&self, path: &Path) -> Result<(), InstallError> {
        if self.force { Ok(()) } else { self.may_replace_unforced(path) }
    }

    /// What is there must be what an earlier run of this has put there.
    fn may_replace_unforced(&self, path: &Path) -> Result<(), InstallError> {
        let there = match fs::read(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            there => there.map_err(failed(path))?,
        };
        let ours = fs::read(copy_of(path)).is_ok_and(|copy| copy == there);
        let same = self.configuration()?.is_some_and(|(content, _)| content == there);
        if ours || same { Ok(()) } else { Err(InstallError::Theirs(path.to_owned())) }
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> InstallError {
    let path = path.to_owned();
    move |source| InstallError::File { path, source }
}

/// Where the copy of an installed configuration stands: `.NAME.installed`.
fn copy_of(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.installed"))
}

/// Whether a binary is this plugin, of whatever version: it says so in its help.
fn is_ours(binary: &[u8]) -> bool {
    let mark = b"Loden's CNI plugin: routed pods";
    binary.windows(mark.len()).any(|window| window == mark)
}

/// Renames what is in the place, once: what was set aside first is the operator's own.
fn set_aside(path: &Path) -> Result<String, InstallError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!("{name}.before-loden"));
    if aside.exists() {
        return Ok(format!("{} replaced; {} is there already and stays", path.display(), aside.display()));
    }
    fs::copy(path, &aside).map_err(failed(&aside))?;
    Ok(format!("{} kept as {}", path.display(), aside.display()))
}

fn put_binary(path: &Path, content: &[u8]) -> Result<String, InstallError> {
    put(path, content, 0o755)?;
    Ok(format!("{} installed", path.display()))
}

/// Puts a file in place by a rename, unless it is there just so.
fn put(path: &Path, content: &[u8], mode: u32) -> Result<(), InstallError> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let put = || {
        let same = fs::metadata(path).is_ok_and(|there| there.permissions().mode() & 0o7777 == mode)
            && fs::read(path).is_ok_and(|there| there == content);
        if same {
            return Ok(());
        }
        fs::create_dir_all(directory)?;
        let mut temporary = tempfile::Builder::new().prefix(".loden.").tempfile_in(directory)?;
        temporary.write_all(content)?;
        temporary.as_file().set_permissions(fs::Permissions::from_mode(mode))?;
        temporary.as_file().sync_all()?;
        temporary.persist(path).map_err(|error| error.error)?;
        File::open(directory)?.sync_all()
    };
    put().map_err(failed(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn install(root: &Path) -> Install {
        Install {
            bin_dir: root.join("bin"),
            conf_dir: root.join("net.d"),
            conf: None,
            conf_name: "10-loden.conflist".into(),
            no_conf: false,
            flannel: false,
            force: false,
        }
    }

    fn conf(root: &Path, text: &str) -> PathBuf {
        let path = root.join("given.conflist");
        fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn plugin_and_configuration_are_put_in_place_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        install(root.path()).run().unwrap();
        let names = |directory: &str| {
            let entries = fs::read_dir(root.path().join(directory)).unwrap();
            let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names("bin"), ["loden-cni"]);
        assert_eq!(names("net.d"), [".10-loden.conflist.installed", "10-loden.conflist"]);
        let mode = fs::metadata(root.path().join("bin/loden-cni")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
        let conf: Value =
            serde_json::from_slice(&fs::read(root.path().join("net.d/10-loden.conflist")).unwrap()).unwrap();
        assert_eq!(conf["plugins"][0]["type"], routed::TYPE);
        install(root.path()).run().unwrap();
    }

    #[test]
    fn an_earlier_installation_is_replaced_and_an_operators_change_is_not() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("net.d/10-loden.conflist");
        install(root.path()).run().unwrap();
        let given = conf(root.path(), r#"{"name":"mine","plugins":[{"type":"loden-cni"}]}"#);
        let newer = Install { conf: Some(given), ..install(root.path()) };
        newer.run().unwrap();
        assert!(fs::read_to_string(&path).unwrap().contains("mine"));

        fs::write(&path, "{\"name\":\"theirs\"}").unwrap();
        let error = newer.run().unwrap_err();
        assert!(matches!(&error, InstallError::Theirs(theirs) if *theirs == path), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"name\":\"theirs\"}");
        assert!(!root.path().join("bin/flannel").exists());

        Install { force: true, ..newer }.run().unwrap();
        assert!(fs::read_to_string(&path).unwrap().contains("mine"));
        let kept = path.with_file_name("10-loden.conflist.before-loden");
        assert_eq!(fs::read_to_string(kept).unwrap(), "{\"name\":\"theirs\"}");
    }

    #[test]
    fn flannels_own_plugin_is_kept_aside_once() {
        let root = tempfile::tempdir().unwrap();
        let (plugin, kept) = (root.path().join("bin/flannel"), root.path().join("bin/flannel.before-loden"));
        fs::create_dir(root.path().join("bin")).unwrap();
        fs::write(&plugin, "flannel's").unwrap();
        let install = Install { flannel: true, no_conf: true, ..install(root.path()) };
        install.run().unwrap();
        assert_eq!(fs::read(&kept).unwrap(), b"flannel's");
        assert_eq!(fs::read(&plugin).unwrap(), fs::read(root.path().join("bin/loden-cni")).unwrap());
        fs::write(&plugin, "flannel's, newer").unwrap();
        install.run().unwrap();
        assert_eq!(fs::read(&kept).unwrap(), b"flannel's");
        assert!(!root.path().join("net.d").exists());
    }

    #[test]
    fn a_configuration_that_no_runtime_could_use_is_refused_before_anything_is_written() {
        let root = tempfile::tempdir().unwrap();
        for (text, why) in [
            ("{", "it is not JSON"),
            ("{\"plugins\":[{}]}", "it has no \"name\""),
            ("{\"name\":\"n\"}", "it has no \"plugins\""),
        ] {
            let wrong = Install { conf: Some(conf(root.path(), text)), ..install(root.path()) };
            let error = wrong.run().unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let named = Install { conf_name: "10-loden.conflist~".into(), ..install(root.path()) };
        assert!(named.run().unwrap_err().to_string().contains("--conf-name=10-loden.conflist~ must be"));
        assert!(!root.path().join("bin").exists());
    }
}
