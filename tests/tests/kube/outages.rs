//! The API ends watches, forgets history, refuses, freezes, is restored, is away.

use std::time::Duration;

use crate::{
    server::{Cut, Fault},
    source::{Source, cluster_of, lost, mac, network, options},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_ends_goes_on_from_where_it_was() {
    for cut in [Cut::Clean, Cut::MidLine] {
        let server = cluster_of(3);
        let source = Source::start(&server).await;
        source.until_peers(&[2, 3]).await;
        {
            // Between the two watches, one node leaves and another comes.
            let mut store = server.store();
            store.cut(cut);
            store.delete_node("n2");
            store.add_node("n4", Some("10.244.4.0/24"));
            store.annotate_as_flannel("n4", "192.168.64.4", &mac(4));
        }
        source.until_peers(&[3, 4]).await;
        let store = server.store();
        assert_eq!(store.listings(), 1, "{cut:?}");
        assert!(store.watches().len() >= 2, "{cut:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_whose_time_is_over_is_asked_for_anew() {
    let server = cluster_of(2);
    let mut short = options(&server.url());
    short.watch = Duration::from_secs(1);
    let source = Source::try_start(short, network(), 1).await.unwrap();
    server.until("the third watch", |store| store.watches().len() >= 3);
    assert!(source.now().connected);
    assert_eq!(server.store().listings(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bookmark_is_where_the_next_watch_goes_on() {
    let server = cluster_of(2);
    let source = Source::start(&server).await;
    server.until("the condition", |store| {
        store.condition("n1", "NetworkUnavailable").unwrap()["status"] == "False"
    });
    {
        // Other things move the version on, and what the watcher saw last is forgotten.
        let mut store = server.store();
        store.compact();
        store.bookmark();
    }
    let bookmarked = server.store().version();
    // The bookmark is a line of its own: give it time to arrive before the watch ends.
    tokio::time::sleep(Duration::from_millis(300)).await;
    server.store().cut(Cut::Clean);
    server.until("the next watch", |store| store.watches().len() >= 2);
    let watches = server.store().watches();
    assert!(watches[1].uri.ends_with(&format!("resourceVersion={bookmarked}")), "{}", watches[1].uri);
    server.store().annotate_as_flannel("n2", "192.168.64.2", &mac(0x22));
    source.until("it goes on", |cluster| crate::source::vtep(cluster, 2) == Some(0x22)).await;
    assert_eq!(server.store().listings(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_is_too_old_means_a_new_listing() {
    for (cut, fault) in [(Cut::Gone, None), (Cut::Clean, None), (Cut::MidLine, Some(Fault::GoneByStatus))] {
        let server = cluster_of(3);
        let source = Source::start(&server).await;
        source.until_peers(&[2, 3]).await;
        {
            let mut store = server.store();
            store.fault = fault.clone();
            store.cut(cut);
            store.delete_node("n2");
            store.add_node("n4", Some("10.244.4.0/24"));
            store.annotate_as_flannel("n4", "192.168.64.4", &mac(4));
            store.compact();
        }
        let cluster = source.until_peers(&[3, 4]).await;
        assert_eq!(lost(&cluster), None);
        assert_eq!(server.store().listings(), 2, "{cut:?} {fault:?}");
        source.until("it follows again", |cluster| cluster.connected).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_that_was_restored_to_an_earlier_version_is_listed_again() {
    let server = cluster_of(3);
    let source = Source::start(&server).await;
    source.until_peers(&[2, 3]).await;
    {
        let mut store = server.store();
        store.restore(2);
        store.cut(Cut::MidLine);
        store.delete_node("n2");
    }
    source.until_peers(&[3]).await;
    source.until("it follows again", |cluster| cluster.connected).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_are_waited_out_and_change_nothing() {
    for code in [401, 403, 429, 500, 503] {
        let server = cluster_of(3);
        let source = Source::start(&server).await;
        let before = source.until_peers(&[2, 3]).await;
        {
            let mut store = server.store();
            store.fault = Some(Fault::Status(code));
            store.cut(Cut::MidLine);
        }
        let away = source.until("it has lost the API", |cluster| !cluster.connected).await;
        assert_eq!((&away.peers, &away.own), (&before.peers, &before.own), "{code}");
        tokio::time::sleep(Duration::from_millis(500)).await;
        let asked = server.store().requests.len();
        assert!(asked < 30, "{code}: it is asked with pauses, not {asked} times");
        server.store().fault = None;
        source.until("it follows again", |cluster| cluster.connected).await;
        assert_eq!(server.store().listings(), 1, "{code}: it goes on from where it was");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_that_falls_silent_is_noticed_and_changes_nothing() {
    let server = cluster_of(3);
    let mut short = options(&server.url());
    (short.watch, short.limit) = (Duration::from_secs(1), Duration::from_secs(1));
    let source = Source::try_start(short, network(), 1).await.unwrap();
    let before = source.until_peers(&[2, 3]).await;
    server.store().fault = Some(Fault::Frozen);
    let away = source.until("it has noticed", |cluster| !cluster.connected).await;
    assert_eq!((&away.peers, &away.own), (&before.peers, &before.own));
    server.store().delete_node("n2");
    server.store().fault = None;
    source.until_peers(&[3]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_that_is_away_changes_nothing_and_is_caught_up_with() {
    let mut server = cluster_of(3);
    let source = Source::start(&server).await;
    let before = source.until_peers(&[2, 3]).await;
    server.stop();
    let away = source.until("it has noticed", |cluster| !cluster.connected).await;
    assert_eq!((&away.peers, &away.own), (&before.peers, &before.own));
    server.store().delete_node("n3");
    server.store().add_node("n4", Some("10.244.4.0/24"));
    server.store().annotate_as_flannel("n4", "192.168.64.4", &mac(4));
    // What we are changes meanwhile as well.
    source.set_attrs(crate::source::attrs(0x51));
    server.start();
    source.until_peers(&[2, 4]).await;
    server.until("our new address", |store| {
        store.node("n1").unwrap()["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"]
            == "192.168.64.81"
    });
    assert_eq!(server.store().listings(), 1);
}
