//! What is read out of a directory of registries' settings, and what is refused.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

fn read(text: &str) -> Result<Vec<Host>> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("a.b")).unwrap();
    std::fs::write(dir.path().join("a.b/hosts.toml"), text).unwrap();
    load(dir.path(), "a.b").map(|h| h.unwrap().hosts)
}

fn apis(hosts: &[Host]) -> Vec<&str> {
    hosts.iter().map(|h| h.api.as_ref().map_or("", Url::as_str)).collect()
}

#[test]
fn hosts_come_in_the_order_of_the_file_and_then_the_server() {
    let hosts = read(
        r#"
server = "https://registry-1.docker.io"
[host."https://z.example"]
  capabilities = ["pull"]
[host."http://a.example:5000/prefix/"]
  capabilities = ["Pull", "resolve"]
  override_path = true
[host."m.example/sub"]
"#,
    )
    .unwrap();
    assert_eq!(
        apis(&hosts),
        [
            "https://z.example/v2/",
            "http://a.example:5000/prefix/",
            "https://m.example/sub/v2/",
            "https://registry-1.docker.io/v2/"
        ]
    );
    assert_eq!(hosts[0].can, Capabilities { pull: true, resolve: false, push: false });
    assert_eq!(hosts[1].can, Capabilities { pull: true, resolve: true, push: false });
    assert_eq!(hosts[3].can, Capabilities::ALL);
}

#[test]
fn without_a_server_the_registry_itself_comes_last() {
    assert_eq!(apis(&read("[host.\"https://m.example\"]\n").unwrap()), ["https://m.example/v2/", ""]);
    assert_eq!(apis(&read("server = \"docker.io\"\n").unwrap()), ["https://registry-1.docker.io/v2/"]);
    assert_eq!(read("  \n").unwrap(), [Host::default()]);
}

#[test]
fn all_that_containerd_knows_is_read() {
    let hosts = read(
        r#"
ca = "one.pem"
client = ["both.pem"]
dial_timeout = "1m1.5s"
[host."https://m.example"]
  ca = ["/etc/a.pem", "b.pem"]
  client = [["c.cert", "c.key"], ["d.pem", ""]]
  skip_verify = true
  proxy = "http://proxy.example:3128"
  [host."https://m.example".header]
    x-one = "1"
    x-two = ["2", "3"]
"#,
    )
    .unwrap();
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let mirror = &hosts[0];
    assert_eq!(mirror.ca[0], Path::new("/etc/a.pem"));
    assert_eq!(name(&mirror.ca[1]), "b.pem");
    assert_eq!(name(mirror.client[0].1.as_ref().unwrap()), "c.key");
    assert_eq!((name(&mirror.client[1].0), &mirror.client[1].1), ("d.pem".into(), &None));
    assert!(mirror.skip_verify && mirror.tls);
    assert_eq!(mirror.headers.get_all("X-Two").iter().count(), 2);
    assert_eq!(mirror.proxy.as_ref().unwrap().as_str(), "http://proxy.example:3128/");
    assert_eq!((hosts[1].ca.len(), hosts[1].client.len()), (1, 1));
    assert_eq!(hosts[1].dial_timeout, Some(Duration::from_millis(61_500)));
}

#[test]
fn what_is_wrong_is_named_with_its_line() {
    for (text, line, said) in [
        ("\nserver = \"https://a\"\nmirror = 1\n", 3, "unknown key \"mirror\""),
        ("[host.\"https://a\"]\n  skipverify = true\n", 2, "unknown key \"skipverify\""),
        ("[host.\"https://a\"]\n  capabilities = [\"pull\", \"fly\"]\n", 2, "unknown capability \"fly\""),
        ("skip_verify = \"yes\"", 1, "neither true nor false"),
        ("ca = 7", 1, "ca is not a string"),
        ("client = [[\"a\"]]", 1, "a pair is"),
        ("dial_timeout = \"5\"", 1, "dial_timeout"),
        ("dial_timeout = \"1000h\"", 1, "dial_timeout"),
        ("proxy = \"socks5://a:1\"", 1, "SOCKS is not supported"),
        ("server = \"ftp://a\"", 1, "neither http nor https"),
        ("server = \"https://me:secret@a\"", 1, "user or password"),
        ("host = 1", 1, "host is not a table"),
        ("\n[host", 2, ""),
    ] {
        let error = read(text).unwrap_err();
        let Error::Settings { line: at, reason, .. } = &error else { panic!("{error}") };
        assert_eq!(*at, Some(line), "{error}");
        assert!(reason.contains(said) && !reason.contains("secret"), "{error}");
    }
}

#[test]
fn a_registrys_own_directory_comes_before_that_of_all() {
    let dir = tempfile::tempdir().unwrap();
    let add = |name: &str| {
        std::fs::create_dir(dir.path().join(name)).unwrap();
        std::fs::write(dir.path().join(name).join("hosts.toml"), format!("server = \"{name}.example\"\n"))
            .unwrap();
    };
    let found = |registry: &str| {
        let found = load(dir.path(), registry).unwrap();
        found.map(|h| (apis(&h.hosts)[0].to_owned(), h.for_all))
    };
    assert_eq!(found("a.b:5000"), None);
    std::fs::create_dir(dir.path().join("_default")).unwrap();
    assert_eq!(found("a.b:5000"), Some((String::new(), true)));
    std::fs::create_dir(dir.path().join("a.b:5000")).unwrap();
    assert_eq!(found("a.b:5000"), Some((String::new(), false)));
    add("a.b_5000_");
    assert_eq!(found("a.b:5000"), Some(("https://a.b_5000_.example/v2/".into(), false)));
    assert_eq!(found("[::1]"), Some((String::new(), true)));
}

#[test]
fn dockers_certificate_files_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join("a.b").join(name);
    std::fs::create_dir(dir.path().join("a.b")).unwrap();
    for name in ["ca.crt", "other.crt", "me.cert", "me.key", "README"] {
        std::fs::write(at(name), "").unwrap();
    }
    let host = load(dir.path(), "a.b").unwrap().unwrap().hosts.remove(0);
    assert_eq!(host.ca, [at("ca.crt"), at("other.crt")]);
    assert_eq!(host.client, [(at("me.cert"), Some(at("me.key")))]);
    assert!(host.tls && host.api.is_none());
    std::fs::remove_file(at("me.key")).unwrap();
    assert!(load(dir.path(), "a.b").unwrap_err().to_string().contains("me.key"));
}
