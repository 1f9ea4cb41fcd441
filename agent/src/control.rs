//! The control socket `<run-dir>/control.sock`: one line names a request, the answer is one JSON document.
//!
//! The requests are answered by the reconcile loop, so an answer is never half of one pass and half of another.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
    time::timeout,
};

/// Longest request line, in bytes.
const LINE_MAX: u64 = 256;
/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(10);

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The whole state, as `loden status --json` prints it.
    Status,
    /// What the agent wants this node to be: [`crate::facts::Facts`].
    Facts,
}

impl Request {
    fn parse(line: &str) -> Option<Self> {
        match line.trim() {
            "status" => Some(Self::Status),
            "facts" => Some(Self::Facts),
            _ => None,
        }
    }

    fn line(self) -> &'static str {
        match self {
            Self::Status => "status\n",
            Self::Facts => "facts\n",
        }
    }
}

/// Requests as they come in, each with the way back.
pub type Requests = mpsc::Receiver<(Request, oneshot::Sender<Value>)>;

/// Asks the loop from inside the agent. Clones ask the same one.
#[derive(Clone, Debug)]
pub struct Asker(mpsc::Sender<(Request, oneshot::Sender<Value>)>);

impl Asker {
    /// Asks, and waits for the answer for a limited time: before the loop runs, nobody answers.
    ///
    /// # Errors
    ///
    /// Where the agent starts still, or ends.
    pub async fn ask(&self, request: Request) -> Result<Value> {
        let asking = async {
            let (back, answer) = oneshot::channel();
            self.0.send((request, back)).await.context("the agent is ending")?;
            answer.await.context("the agent is ending")
        };
        timeout(PATIENCE / 2, asking).await.context("the agent is not up yet")?
    }
}

/// Listens on the socket; a task serves it until the receiver is dropped.
///
/// # Errors
///
/// Where the socket cannot be made.
pub fn listen(run_dir: &Path) -> Result<(Requests, Asker)> {
    let path = socket(run_dir);
    match fs::remove_file(&path) {
        // Left by an agent that was killed: the lock says that none runs.
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("{} cannot be replaced", path.display())),
    }
    let listener = UnixListener::bind(&path)
        .with_context(|| format!("the control socket {} cannot be made", path.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    let (sender, requests) = mpsc::channel(16);
    let asker = Asker(sender.clone());
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else { continue };
            let sender = sender.clone();
            tokio::spawn(async move {
                if let Err(error) = timeout(PATIENCE, serve(stream, sender)).await.unwrap_or(Ok(())) {
                    tracing::debug!("control request: {error:#}");
                }
            });
        }
    });
    Ok((requests, asker))
}

async fn serve(
    mut stream: UnixStream,
    sender: mpsc::Sender<(Request, oneshot::Sender<Value>)>,
) -> Result<()> {
    let (reading, mut writing) = stream.split();
    let mut line = String::new();
    BufReader::new(reading.take(LINE_MAX)).read_line(&mut line).await?;
    let answer = match Request::parse(&line) {
        None => {
            serde_json::json!({ "error": format!("unknown request {:?}; there are: status, facts", line.trim()) })
        }
        Some(request) => {
            let (back, answer) = oneshot::channel();
            sender.send((request, back)).await.context("the agent is ending")?;
            answer.await.context("the agent is ending")?
        }
    };
    writing.write_all(answer.to_string().as_bytes()).await?;
    Ok(writing.shutdown().await?)
}

/// Asks the running agent.
///
/// # Errors
///
/// Where none runs with this directory, or it does not answer.
pub async fn ask(run_dir: &Path, request: Request) -> Result<Value> {
    let path = socket(run_dir);
    let asking = async {
        let mut stream = UnixStream::connect(&path).await.with_context(|| {
            format!("no agent answers at {}; does one run with this --run-dir?", path.display())
        })?;
        stream.write_all(request.line().as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok::<_, anyhow::Error>(serde_json::from_str(&answer)?)
    };
    match timeout(PATIENCE, asking).await {
        Ok(answer) => answer,
        Err(_) => bail!("the agent at {} has not answered for {} s", path.display(), PATIENCE.as_secs()),
    }
}

fn socket(run_dir: &Path) -> PathBuf {
    run_dir.join("control.sock")
}
