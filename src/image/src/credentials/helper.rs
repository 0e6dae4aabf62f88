//! Credential helpers: `docker-credential-NAME get`, which takes the registry on standard input and answers in JSON
//! (docker-credential-helpers' protocol).

use std::{
    ffi::OsString,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::Credentials;

const PATIENCE: Duration = Duration::from_secs(10);
const MAX_ANSWER: u64 = 64 << 10;
/// What a helper says that has nothing.
const NOTHING: &str = "credentials not found in native keychain";
/// The user name by which a helper says that its secret is an identity token.
const TOKEN_USER: &str = "<token>";
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// Where helpers are found and what they see of our environment.
#[derive(Debug, Clone)]
pub(super) struct Helpers {
    path: OsString,
    home: Option<OsString>,
    patience: Duration,
}

impl Default for Helpers {
    fn default() -> Self {
        Self {
            path: std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into()),
            home: std::env::var_os("HOME"),
            patience: PATIENCE,
        }
    }
}

impl Helpers {
    /// Asks a helper; none where it has nothing for the registry.
    ///
    /// # Errors
    /// Why it gave no answer; nothing that it said but its own word of failure.
    pub(super) async fn get(&self, name: &str, server: &str) -> Result<Option<Credentials>, String> {
        let word = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if name.is_empty() || !name.bytes().all(word) {
            return Err("its name is no part of a file name".to_owned());
        }
        let program = format!("docker-credential-{name}");
        let program = self.find(&program).ok_or_else(|| format!("{program} is not in PATH"))?;
        let mut command = tokio::process::Command::new(program);
        command.arg("get").env_clear().env("PATH", &self.path).kill_on_drop(true).process_group(0);
        if let Some(home) = &self.home {
            command.env("HOME", home);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(|e| format!("it cannot be started: {e}"))?;
        let group = Group(child.id());
        let talk = async {
            if let Some(mut stdin) = child.stdin.take() {
                // One that does not want to know has its answer anyway.
                let _ = stdin.write_all(server.as_bytes()).await;
            }
            let mut said = Vec::new();
            if let Some(stdout) = child.stdout.take() {
                stdout.take(MAX_ANSWER + 1).read_to_end(&mut said).await?;
            }
            if said.len() as u64 > MAX_ANSWER {
                return Ok((None, said));
            }
            Ok::<_, std::io::Error>((Some(child.wait().await?), said))
        };
        let outcome = tokio::time::timeout(self.patience, talk).await;
        drop(group);
        let (status, said) = match outcome {
            Err(_) => return Err(format!("it did not answer within {} s", self.patience.as_secs())),
            Ok(Err(error)) => return Err(format!("it cannot be talked to: {error}")),
            Ok(Ok((None, _))) => return Err(format!("it said more than {MAX_ANSWER} bytes")),
            Ok(Ok((Some(status), said))) => (status, said),
        };
        read(status.success(), status.code(), &said)
    }

    fn find(&self, program: &str) -> Option<PathBuf> {
        let dirs = std::env::split_paths(&self.path).filter(|dir| dir.is_absolute());
        let runs = |file: &Path| {
            std::fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
        };
        dirs.map(|dir| dir.join(program)).find(|file| runs(file))
    }
}

/// The helper and what it has started; ended with it.
struct Group(Option<u32>);

impl Drop for Group {
    fn drop(&mut self) {
        let pid = self.0.and_then(|p| i32::try_from(p).ok()).and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            // Mostly there is nobody left.
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
        }
    }
}

fn read(success: bool, code: Option<i32>, said: &[u8]) -> Result<Option<Credentials>, String> {
    if !success {
        let text = String::from_utf8_lossy(said);
        let text: String = text.trim().chars().filter(|c| !c.is_control()).take(200).collect();
        if text == NOTHING {
            return Ok(None);
        }
        let code = code.map_or_else(|| "a signal".to_owned(), |c| format!("exit code {c}"));
        return Err(format!("it ended with {code}: {text}"));
    }
    let answer: Answer =
        serde_json::from_slice(said).map_err(|_| "its answer has no Username and Secret".to_owned())?;
    let mut credentials = Credentials::default();
    if answer.username == TOKEN_USER {
        credentials.identity_token = answer.secret;
    } else {
        (credentials.username, credentials.password) = (answer.username, answer.secret);
    }
    Ok(if credentials.is_empty() { None } else { Some(credentials) })
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use super::*;

    /// Writes a helper and says how it is found.
    pub(crate) fn helper(dir: &Path, name: &str, script: &str) -> Helpers {
        let file = dir.join(format!("docker-credential-{name}"));
        let text = dir.join("script");
        std::fs::write(&text, format!("#!/bin/sh\n{script}\n")).unwrap();
        // A program that is open for writing cannot be started, and what other tests start inherits what we have open.
        let installed =
            std::process::Command::new("install").args(["-m", "755"]).arg(text).arg(file).status();
        assert!(installed.unwrap().success());
        Helpers {
            path: format!("{}:/usr/bin:/bin", dir.display()).into(),
            home: None,
            patience: Duration::from_secs(5),
        }
    }

    async fn ask(script: &str) -> Result<Option<Credentials>, String> {
        let dir = tempfile::tempdir().unwrap();
        helper(dir.path(), "test", script).get("test", "https://a.b").await
    }

    #[tokio::test]
    async fn a_helper_is_asked_for_the_registry() {
        let script =
            r#"[ "$1" = get ] && printf '{"ServerURL":"x","Username":"of %s","Secret":"s"}' "$(cat)""#;
        let got = ask(script).await.unwrap().unwrap();
        assert_eq!((got.username.as_str(), got.password.as_str()), ("of https://a.b", "s"));
        let token = ask(r#"echo '{"Username":"<token>","Secret":"s"}'"#).await.unwrap().unwrap();
        assert_eq!((token.username.as_str(), token.identity_token.as_str()), ("", "s"));
    }

    #[tokio::test]
    async fn a_helper_that_has_nothing_is_no_failure() {
        assert_eq!(ask(&format!("echo {NOTHING}; exit 1")).await, Ok(None));
        assert_eq!(ask(r#"echo '{"Username":"","Secret":""}'"#).await, Ok(None));
    }

    #[tokio::test]
    async fn a_helper_sees_nothing_of_our_environment() {
        let script = r#"printf '{"Username":"%s","Secret":"s"}' "$(env | cut -d= -f1 | sort | tr '\n' ' ')""#;
        let got = ask(script).await.unwrap().unwrap();
        for name in got.username.split_whitespace() {
            // The shell's own.
            assert!(["PATH", "PWD", "OLDPWD", "SHLVL", "_"].contains(&name), "{name}");
        }
    }

    #[tokio::test]
    async fn a_helper_that_misbehaves_is_named() {
        for (script, said) in [
            ("exit 3", "exit code 3"),
            ("echo secret", "no Username and Secret"),
            ("echo locked; exit 1", "exit code 1: locked"),
            (
                "while :; do echo aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa; done",
                "more than 65536",
            ),
        ] {
            assert!(ask(script).await.unwrap_err().contains(said), "{script}");
        }
        let nowhere = Helpers { path: "relative:/nonexistent".into(), ..Helpers::default() };
        assert!(nowhere.get("test", "a").await.unwrap_err().contains("not in PATH"));
        assert!(nowhere.get("../test", "a").await.unwrap_err().contains("name"));
    }

    #[tokio::test]
    async fn a_helper_that_hangs_is_ended_with_what_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let script = format!("sleep 600 & echo $! >{}; wait", pid.display());
        let mut helpers = helper(dir.path(), "test", &script);
        helpers.patience = Duration::from_secs(1);
        assert!(helpers.get("test", "a").await.unwrap_err().contains("did not answer"));
        let pid = std::fs::read_to_string(pid).unwrap();
        let stat = format!("/proc/{}/stat", pid.trim());
        crate::tests::eventually(|| {
            let gone = std::fs::read_to_string(&stat).map_or(true, |s| s.contains(") Z "));
            std::future::ready(gone)
        })
        .await;
    }
}
