use std::future::Future;
use std::net::SocketAddr;
use std::time::Instant;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::*;

struct Server {
    address: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
}

async fn served(readiness: Readiness) -> Server {
    served_with(readiness, Heartbeat::default()).await
}

async fn served_with(readiness: Readiness, heartbeat: Heartbeat) -> Server {
    let routes = routes(readiness, heartbeat);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    Server { address, stop: stop.clone(), task: tokio::spawn(serve_routes(listener, routes, stop)) }
}

/// Status and body of an answer to `method path`.
async fn ask(address: SocketAddr, method: &str, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("{method} {path} HTTP/1.1\r\nHost: loden\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
}

async fn within<T>(seconds: u64, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(seconds), future).await.unwrap()
}

#[tokio::test]
async fn healthz_answers_whether_ready_or_not() {
    let server = served(Readiness::new(&["lease"])).await;
    assert_eq!(ask(server.address, "GET", "/healthz").await, (200, "loden is running\n".into()));
    assert_eq!(ask(server.address, "HEAD", "/healthz").await, (200, String::new()));
}

#[tokio::test]
async fn healthz_refuses_once_the_loop_hangs_and_not_before_it_runs() {
    let limit = Duration::from_millis(400);
    let (readiness, heartbeat) = (Readiness::new(&["lease"]), Heartbeat::with_limit(limit));
    let server = served_with(readiness.clone(), heartbeat.clone()).await;
    let healthz = || ask(server.address, "GET", "/healthz");
    tokio::time::sleep(limit * 2).await;
    assert_eq!(healthz().await, (200, "loden is running\n".into()), "it starts still");
    heartbeat.beat();
    assert_eq!(healthz().await.0, 200);
    tokio::time::sleep(limit * 2).await;
    // Whether the node is ready has no part in it.
    let (status, text) = healthz().await;
    assert!(status == 503 && text.starts_with("loden hangs: its loop came by "), "{status} {text}");
    readiness.set("lease", Ok(()));
    assert_eq!(healthz().await.0, 503);
    heartbeat.beat();
    assert_eq!(healthz().await.0, 200);
}

#[tokio::test]
async fn readyz_lists_what_is_missing_until_nothing_is() {
    let readiness = Readiness::new(&["lease", "datapath"]);
    let server = served(readiness.clone()).await;
    let readyz = || ask(server.address, "GET", "/readyz");
    assert_eq!(readyz().await, (503, "loden is not ready\ndatapath: not yet\nlease: not yet\n".into()));
    readiness.set("datapath", Ok(()));
    readiness.set("lease", Err("etcd does not\nanswer".into()));
    assert_eq!(readyz().await, (503, "loden is not ready\nlease: etcd does not answer\n".into()));
    readiness.set("lease", Ok(()));
    assert_eq!(readyz().await, (200, "loden is ready\n".into()));
    readiness.set("lease", Err("lost".into()));
    assert_eq!(readyz().await, (503, "loden is not ready\nlease: lost\n".into()));
}

#[tokio::test]
async fn other_paths_and_methods_are_refused() {
    let server = served(Readiness::new(&[])).await;
    assert_eq!(ask(server.address, "GET", "/").await.0, 404);
    assert_eq!(ask(server.address, "GET", "/healthz/..").await.0, 404);
    assert_eq!(ask(server.address, "POST", "/healthz").await.0, 405);
}

#[tokio::test]
async fn waiting_ends_when_the_last_condition_holds() {
    let readiness = Readiness::new(&["a", "b"]);
    let waiting = tokio::spawn({
        let readiness = readiness.clone();
        async move { readiness.wait().await }
    });
    readiness.set("a", Ok(()));
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    readiness.set("b", Ok(()));
    within(5, waiting).await.unwrap();
    within(5, Readiness::new(&[]).wait()).await;
}

#[test]
fn a_condition_that_was_not_announced_counts_once_it_is_set() {
    let readiness = Readiness::new(&[]);
    assert!(readiness.missing().is_empty());
    readiness.set("peers", Err("none".into()));
    assert_eq!(readiness.missing(), [("peers", "none".to_owned())]);
}

#[tokio::test]
async fn stopping_does_not_wait_for_a_client_that_says_nothing() {
    let server = served(Readiness::new(&[])).await;
    let mut silent = TcpStream::connect(server.address).await.unwrap();
    silent.write_all(b"GET /healthz HT").await.unwrap();
    ask(server.address, "GET", "/healthz").await;
    let before = Instant::now();
    server.stop.cancel();
    within(5, server.task).await.unwrap().unwrap();
    assert!(before.elapsed() < FAREWELL * 3);
    assert!(TcpStream::connect(server.address).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn silent_clients_are_cut_off_and_leave_room_for_others() {
    const LIFETIME: Duration = Duration::from_millis(500);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let guarded = GuardedListener::with_limits(listener, 2, LIFETIME);
    let routes = routes(Readiness::new(&[]), Heartbeat::default());
    tokio::spawn(serve_guarded(guarded, routes, CancellationToken::new()));
    let before = Instant::now();
    let mut silent = Vec::new();
    for _ in 0..2 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    assert_eq!(within(10, ask(address, "GET", "/healthz")).await.0, 200);
    assert!(before.elapsed() >= LIFETIME, "served beside two others, although two is the limit");
    for mut stream in silent {
        within(5, stream.read_to_end(&mut Vec::new())).await.unwrap();
    }
}
