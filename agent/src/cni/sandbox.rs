//! A container's network namespace.

use std::{
    fs::File,
    io::ErrorKind,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    thread,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::statfs::{FsType, fstatfs},
};
use tokio::runtime::Builder;

use super::{
    error::{CniError, Result, code},
    request::Environment,
};
use crate::kernel::Kernel;

/// `NSFS_MAGIC` of the kernel's `magic.h`: the file system whose files are namespaces.
const NSFS: FsType = FsType(0x6e73_6673);

/// An open network namespace: it stays while this does.
#[derive(Debug)]
pub struct Sandbox {
    path: PathBuf,
    file: File,
}

impl Sandbox {
    /// Opens `CNI_NETNS`.
    ///
    /// # Errors
    ///
    /// Code 3 where it does not exist, 4 where it is no namespace.
    pub fn open(env: &Environment) -> Result<Self> {
        let path = env.netns.clone().unwrap_or_default();
        let shown = path.display();
        let file = File::open(&path).map_err(|error| {
            let code = if error.kind() == ErrorKind::NotFound {
                code::UNKNOWN_CONTAINER
            } else {
                code::BAD_ENVIRONMENT
            };
            CniError::new(code, format_args!("CNI_NETNS={shown} cannot be opened: {error}"))
        })?;
        if !fstatfs(&file).is_ok_and(|found| found.filesystem_type() == NSFS) {
            let error =
                format!("CNI_NETNS={shown} must be the file of a network namespace, such as /run/netns/NAME");
            return Err(CniError::new(code::BAD_ENVIRONMENT, error));
        }
        Ok(Self { path, file })
    }

    /// Its path, as the runtime gave it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Works inside, on a thread of its own: a namespace belongs to a thread.
    ///
    /// # Errors
    ///
    /// Code 4 where it cannot be entered; those of `work`.
    pub fn inside<T: Send>(&self, work: impl AsyncFnOnce(&Kernel) -> Result<T> + Send) -> Result<T> {
        let inside = || {
            setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|errno| {
                let path = self.path.display();
                CniError::new(
                    code::BAD_ENVIRONMENT,
                    format_args!("CNI_NETNS={path} cannot be entered: {errno}"),
                )
            })?;
            let runtime = Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|error| CniError::new(code::IO, error))?;
            runtime.block_on(async { work(&Kernel::connect()?).await })
        };
        thread::scope(|scope| {
            scope.spawn(inside).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl AsFd for Sandbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
