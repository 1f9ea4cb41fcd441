use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use tempfile::TempDir;

use super::*;

#[tokio::test]
async fn an_address_that_cannot_be_had_is_named_with_its_flags() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();
    let error = serve(address, "--metrics-addr", Router::new(), CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.to_string(), format!("cannot listen on {address} (--metrics-addr)"));
}

/// What a service manager hears, which wants a sign of life every 20 ms.
struct Manager {
    socket: UnixDatagram,
    service: ServiceManager,
    _directory: TempDir,
}

impl Manager {
    fn start() -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        let env = |name: &str| match name {
            "NOTIFY_SOCKET" => Some(path.display().to_string()),
            "WATCHDOG_USEC" => Some("20000".to_owned()),
            _ => None,
        };
        Self { socket, service: ServiceManager::find(&env, std::process::id()), _directory: directory }
    }

    /// What it has heard since it was last asked.
    fn heard(socket: &UnixDatagram) -> Vec<String> {
        let mut buffer = [0; 256];
        let next =
            || socket.recv(&mut buffer).ok().map(|len| String::from_utf8_lossy(&buffer[..len]).into_owned());
        std::iter::from_fn(next).collect()
    }
}

#[tokio::test]
async fn a_loop_that_hangs_is_told_of_though_the_node_is_not_ready_and_one_that_has_not_begun_is_not() {
    const LIMIT: Duration = Duration::from_millis(300);
    let Manager { socket, service, _directory } = Manager::start();
    let (readiness, heartbeat) = (Readiness::new(&["lease"]), Heartbeat::with_limit(LIMIT));
    let stop = CancellationToken::new();
    let reporting = tokio::spawn(report(service, readiness.clone(), heartbeat.clone(), stop.clone()));
    let fed = |heard: &[String]| heard.iter().any(|line| line == "WATCHDOG=1");

    tokio::time::sleep(LIMIT * 2).await;
    let heard = Manager::heard(&socket);
    assert!(fed(&heard) && heard.contains(&"STATUS=not ready: lease: not yet".to_owned()), "{heard:?}");
    tokio::time::sleep(LIMIT / 3).await;
    assert!(fed(&Manager::heard(&socket)), "it starts still");
    heartbeat.beat();
    tokio::time::sleep(LIMIT * 2).await;
    Manager::heard(&socket);
    tokio::time::sleep(LIMIT / 3).await;
    assert!(!fed(&Manager::heard(&socket)), "the loop has begun and hangs");

    heartbeat.beat();
    readiness.set("lease", Ok(()));
    tokio::time::sleep(LIMIT / 3).await;
    let heard = Manager::heard(&socket);
    for line in ["READY=1", "STATUS=ready", "WATCHDOG=1"] {
        assert!(heard.iter().any(|told| told == line), "{line}: {heard:?}");
    }
    stop.cancel();
    reporting.await.unwrap();
    assert_eq!(Manager::heard(&socket).last().map(String::as_str), Some("STOPPING=1"));
}
