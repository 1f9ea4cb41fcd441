//! Kernel parameters below `/proc/sys`.
//!
//! Those below `net` belong to the network namespace of the calling thread.

use std::{fs, io, path::PathBuf};

/// Why a parameter could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    /// Not a name: empty, or with `..` in it.
    #[error("sysctl name {0:?} is not valid: it should look like net.ipv4.ip_forward or net/ipv4/ip_forward")]
    BadName(String),
    /// This kernel has no such parameter.
    #[error("sysctl {name} does not exist on this kernel ({})", path.display())]
    Absent {
        /// The name that was asked for.
        name: String,
        /// Its file.
        path: PathBuf,
    },
    /// `/proc/sys` is mounted read-only, as it is in a container that is not privileged.
    #[error("sysctl {name} cannot be set to {value}: {} is read-only; run privileged, or set it on the host", path.display())]
    ReadOnly {
        /// The name that was asked for.
        name: String,
        /// What it should become.
        value: String,
        /// Its file.
        path: PathBuf,
    },
    /// Another failure.
    #[error("sysctl {name} cannot be {verb}: {source}")]
    Failed {
        /// The name that was asked for.
        name: String,
        /// `read` or `set to VALUE`.
        verb: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The value of a parameter, without the line end.
///
/// As in sysctl(8), the first separator in a name decides: in `net.ipv4.ip_forward` the dots separate, in
/// `net/ipv6/conf/flannel.1/accept_ra` the slashes do, and the dot is a dot.
///
/// # Errors
///
/// [`SysctlError::Absent`] where the kernel has no such parameter.
pub fn get(name: &str) -> Result<String, SysctlError> {
    let path = path(name)?;
    fs::read_to_string(&path).map(|text| text.trim_end().to_owned()).map_err(|source| {
        if source.kind() == io::ErrorKind::NotFound {
            return SysctlError::Absent { name: name.to_owned(), path };
        }
        SysctlError::Failed { name: name.to_owned(), verb: "read".to_owned(), source }
    })
}

/// Sets a parameter; one that has the value already is not written (so a read-only `/proc/sys` is no
/// obstacle to what is right as it is).
///
/// # Errors
///
/// [`SysctlError::ReadOnly`] where `/proc/sys` is mounted so, [`SysctlError::Absent`] where the kernel has no
/// such parameter.
pub fn set(name: &str, value: &str) -> Result<(), SysctlError> {
    if get(name)? == value {
        return Ok(());
    }
    let path = path(name)?;
    fs::write(&path, value).map_err(|source| {
        let (name, value) = (name.to_owned(), value.to_owned());
        if source.kind() == io::ErrorKind::ReadOnlyFilesystem {
            return SysctlError::ReadOnly { name, value, path };
        }
        SysctlError::Failed { name, verb: format!("set to {value}"), source }
    })
}

fn path(name: &str) -> Result<PathBuf, SysctlError> {
    let relative = match name.find(['.', '/']) {
        Some(at) if name[at..].starts_with('.') => name
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                c => c,
            })
            .collect(),
        _ => name.to_owned(),
    };
    let bad = relative.split('/').any(|part| part.is_empty() || part == "." || part == "..");
    if bad {
        Err(SysctlError::BadName(name.to_owned()))
    } else {
        Ok(PathBuf::from("/proc/sys").join(relative))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_separator_decides() {
        let path = |name| path(name).unwrap().to_str().unwrap().to_owned();
        assert_eq!(path("net.ipv4.ip_forward"), "/proc/sys/net/ipv4/ip_forward");
        assert_eq!(path("net/ipv6/conf/flannel.1/accept_ra"), "/proc/sys/net/ipv6/conf/flannel.1/accept_ra");
        assert_eq!(path("net.ipv6.conf.flannel/1.accept_ra"), "/proc/sys/net/ipv6/conf/flannel.1/accept_ra");
    }

    #[test]
    fn a_name_cannot_leave_proc_sys() {
        for name in ["", "net/../../etc/passwd", "/etc/passwd", "net..ipv4", "net/ipv4/"] {
            assert!(matches!(path(name), Err(SysctlError::BadName(_))), "{name:?}");
        }
    }

    #[test]
    fn an_absent_parameter_is_named() {
        let error = get("net.ipv4.no_such_thing").unwrap_err();
        assert_eq!(
            error.to_string(),
            "sysctl net.ipv4.no_such_thing does not exist on this kernel (/proc/sys/net/ipv4/no_such_thing)"
        );
    }
}
