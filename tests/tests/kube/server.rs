//! A double of the Kubernetes API server, as far as nodes go: real HTTP, and the API's own rules for versions, watches,
//! pages, patches and refusals.
//!
//! Written after the API's documentation ("Kubernetes API Concepts": resource versions, efficient detection of changes,
//! retrieving large results in chunks, bookmarks, metadata-only fetches) and the types of `meta/v1`. It can be told to
//! misbehave in the ways in which real ones do.

mod answer;
mod patch;
mod store;
mod watch;

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use axum::serve::ListenerExt as _;
use loden_tests::{etcd::Authority, netns::Netns};
use serde_json::Value;
use tokio::{net::TcpListener, sync::oneshot};

use self::store::Store;
pub(crate) use self::{store::Fault, watch::Cut};

/// A running double. Dropping it ends it.
pub(crate) struct Server {
    store: Arc<Mutex<Store>>,
    netns: Option<String>,
    address: SocketAddr,
    tls: Option<Arc<tokio_rustls::rustls::ServerConfig>>,
    running: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Server {
    /// On loopback.
    pub(crate) fn on_loopback() -> Self {
        Self::listen(None, SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), None)
    }

    /// On loopback, over TLS, for who shows this token.
    pub(crate) fn with_tls(authority: &Authority, token: &str) -> Self {
        Self::guarded(None, authority, token)
    }

    /// The same on the loopback of a namespace.
    pub(crate) fn with_tls_inside(netns: &Netns, authority: &Authority, token: &str) -> Self {
        Self::guarded(Some(netns), authority, token)
    }

    fn guarded(netns: Option<&Netns>, authority: &Authority, token: &str) -> Self {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let server = Self::listen(netns, address, Some(tls::config(authority)));
        server.store().token = Some(token.to_owned());
        server
    }

    /// At an address inside of a namespace.
    pub(crate) fn inside(netns: &Netns, address: Ipv4Addr) -> Self {
        Self::listen(Some(netns), SocketAddr::from((address, 6443)), None)
    }

    fn listen(
        netns: Option<&Netns>,
        address: SocketAddr,
        tls: Option<Arc<tokio_rustls::rustls::ServerConfig>>,
    ) -> Self {
        let netns = netns.map(|netns| netns.name().to_owned());
        let mut server = Self { store: Arc::default(), netns, address, tls, running: None };
        server.start();
        server
    }

    /// Serves again after [`Self::stop`], at the same address, what it had before.
    pub(crate) fn start(&mut self) {
        assert!(self.running.is_none());
        let (netns, address, tls) = (self.netns.clone(), self.address, self.tls.clone());
        let store = Arc::clone(&self.store);
        let (stop, stopped) = oneshot::channel();
        let (ready, up) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            if let Some(netns) = netns {
                let file = std::fs::File::open(format!("/run/netns/{netns}")).unwrap();
                nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let socket = tokio::net::TcpSocket::new_v4().unwrap();
                socket.set_reuseaddr(true).unwrap();
                socket.bind(address).unwrap();
                let listener: TcpListener = socket.listen(1024).unwrap();
                ready.send(listener.local_addr().unwrap()).unwrap();
                let router = answer::router(store);
                let served = async {
                    match tls {
                        None => axum::serve(listener.tap_io(|tcp| drop(tcp.set_nodelay(true))), router).await,
                        Some(config) => axum::serve(tls::Listener::new(listener, config), router).await,
                    }
                };
                // Ending the runtime closes every connection at once, as a killed server does.
                tokio::select! { _ = stopped => {}, ended = served => ended.unwrap() }
            });
        });
        self.address = up.recv().unwrap();
        self.running = Some((stop, thread));
    }

    /// Ends it as a kill does; what it knows stays.
    pub(crate) fn stop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            let _ = stop.send(());
            thread.join().unwrap();
            self.store().forget_watchers();
        }
    }

    pub(crate) fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// What it knows, to look at and to change; watchers are told.
    pub(crate) fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node as it is now.
    pub(crate) fn node(&self, name: &str) -> Value {
        self.store().node(name).unwrap_or_else(|| panic!("no node {name}"))
    }

    /// A node's annotation under flannel's usual prefix.
    pub(crate) fn annotation(&self, name: &str, end: &str) -> Option<String> {
        let node = self.node(name);
        node["metadata"]["annotations"][format!("flannel.alpha.coreos.com/{end}")].as_str().map(str::to_owned)
    }

    /// Waits until something is as it should be.
    pub(crate) fn until(&self, what: &str, mut is: impl FnMut(&Store) -> bool) {
        loden_tests::process::wait_for(what, Duration::from_secs(20), || is(&self.store()).then_some(()))
            .unwrap_or_else(|error| panic!("{error:#}; requests: {:#?}", self.store().requests));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            let _ = stop.send(());
            let _ = thread.join();
        }
    }
}

/// TLS below HTTP.
mod tls {
    use std::{io, net::SocketAddr, sync::Arc};

    use loden_tests::etcd::Authority;
    use tokio::net::{TcpListener, TcpStream};
    use tokio_rustls::{
        TlsAcceptor,
        rustls::{
            ServerConfig,
            pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
        },
        server::TlsStream,
    };

    pub(super) fn config(authority: &Authority) -> Arc<ServerConfig> {
        let pair = authority.server();
        let chain = CertificateDer::pem_file_iter(&pair.cert).unwrap().collect::<Result<_, _>>().unwrap();
        let key = PrivateKeyDer::from_pem_file(&pair.key).unwrap();
        Arc::new(ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).unwrap())
    }

    pub(super) struct Listener {
        listener: TcpListener,
        acceptor: TlsAcceptor,
    }

    impl Listener {
        pub(super) fn new(listener: TcpListener, config: Arc<ServerConfig>) -> Self {
            Self { listener, acceptor: config.into() }
        }
    }

    impl axum::serve::Listener for Listener {
        type Io = TlsStream<TcpStream>;
        type Addr = SocketAddr;

        async fn accept(&mut self) -> (Self::Io, Self::Addr) {
            loop {
                let (stream, address) = self.listener.accept().await.unwrap();
                // A client that does not trust us ends here.
                if let Ok(stream) = self.acceptor.accept(stream).await {
                    return (stream, address);
                }
            }
        }

        fn local_addr(&self) -> io::Result<Self::Addr> {
            self.listener.local_addr()
        }
    }
}
