//! The way to an etcd: a port on loopback that passes everything on, until it is told otherwise.

use std::sync::{Arc, Mutex};

use loden_tests::etcd::Etcd;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
};

#[derive(Clone, Copy, PartialEq)]
enum State {
    Open,
    /// Requests get there, and no answer comes back.
    Mute,
    /// Connections stay, and nothing comes through.
    Held,
    /// Connections end, and new ones end at once.
    Cut,
}

pub(crate) struct Way {
    pub(crate) endpoint: String,
    state: watch::Sender<State>,
    last_words: Arc<Mutex<Option<Vec<u8>>>>,
}

impl Way {
    pub(crate) async fn to(etcd: &Etcd) -> Self {
        let target = etcd.endpoint().strip_prefix("http://").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (state, receiver) = watch::channel(State::Open);
        let last_words = Arc::<Mutex<Option<Vec<u8>>>>::default();
        let (mutes, muted_by) = (state.clone(), Arc::clone(&last_words));
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let (target, mut state) = (target.clone(), receiver.clone());
                let (mutes, muted_by) = (mutes.clone(), Arc::clone(&muted_by));
                tokio::spawn(async move {
                    let Ok(far) = TcpStream::connect(target).await else { return };
                    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                    let listen = |request: &[u8]| {
                        let mut last_words = muted_by.lock().unwrap();
                        let is_last =
                            |words: &Vec<u8>| request.windows(words.len()).any(|part| part == *words);
                        if last_words.take_if(|words| is_last(words)).is_some() {
                            mutes.send_replace(State::Mute);
                        }
                    };
                    let requests_pass = |state: State| matches!(state, State::Open | State::Mute);
                    let answers_pass = |state: State| state == State::Open;
                    tokio::select! {
                        () = pass(near_in, far_out, state.clone(), requests_pass, listen) => {}
                        () = pass(far_in, near_out, state.clone(), answers_pass, |_| {}) => {}
                        _ = state.wait_for(|state| *state == State::Cut) => {}
                    }
                });
            }
        });
        Self { endpoint, state, last_words }
    }

    /// The first request that has these words in it gets there, and from then on no answer comes back.
    pub(crate) fn mute_after(&self, words: &str) {
        *self.last_words.lock().unwrap() = Some(words.as_bytes().to_vec());
    }

    pub(crate) fn cut(&self) {
        self.state.send_replace(State::Cut);
    }

    pub(crate) fn hold(&self) {
        self.state.send_replace(State::Held);
    }

    pub(crate) fn mend(&self) {
        self.state.send_replace(State::Open);
    }
}

async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut state: watch::Receiver<State>,
    passes: impl Fn(State) -> bool,
    listen: impl Fn(&[u8]),
) {
    let mut buffer = vec![0; 1 << 16];
    loop {
        if state.wait_for(|state| passes(*state)).await.is_err() {
            return;
        }
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(length) => {
                listen(&buffer[..length]);
                // What was read while the way was shut waits as well.
                let open = state.wait_for(|state| passes(*state)).await.is_ok();
                if !open || to.write_all(&buffer[..length]).await.is_err() {
                    return;
                }
            }
        }
    }
}
