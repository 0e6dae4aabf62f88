//! Executing a command as `execvp` does, with the words of runc where it fails.

use std::{collections::BTreeMap, ffi::CString, fs, os::unix::fs::PermissionsExt};

/// Where commands are looked for when the environment has no `PATH`.
pub(crate) const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Executes; returns only when that fails, with the reason.
pub(crate) fn execute(args: &[String], env: &BTreeMap<String, String>) -> String {
    let Some(name) = args.first() else { return "no command given".into() };
    let file = match find(name, env.get("PATH").map_or(DEFAULT_PATH, String::as_str)) {
        Ok(file) => file,
        Err(reason) => return reason,
    };
    let strings = |all: Vec<String>| -> Option<Vec<CString>> {
        all.into_iter().map(|s| CString::new(s).ok()).collect()
    };
    let vars = env.iter().map(|(k, v)| format!("{k}={v}")).collect();
    let (Some(argv), Some(envp), Ok(path)) =
        (strings(args.to_vec()), strings(vars), CString::new(file.clone()))
    else {
        return format!("exec: {name:?}: an argument or variable has a NUL byte");
    };
    let pointers = |all: &[CString]| {
        let mut out: Vec<_> = all.iter().map(|s| s.as_ptr()).collect();
        out.push(std::ptr::null());
        out
    };
    let (argv_pointers, env_pointers) = (pointers(&argv), pointers(&envp));
    // SAFETY: both arrays end with a null pointer and outlive the call, as do their strings.
    unsafe { libc::execve(path.as_ptr(), argv_pointers.as_ptr(), env_pointers.as_ptr()) };
    let error = std::io::Error::last_os_error();
    format!("exec {file}: {}", words(&error))
}

fn words(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOENT) => "no such file or directory".into(),
        Some(libc::EACCES) => "permission denied".into(),
        Some(libc::ENOEXEC) => "exec format error".into(),
        Some(libc::E2BIG) => "argument list too long".into(),
        Some(libc::ENOTDIR) => "not a directory".into(),
        _ => error.to_string(),
    }
}

/// The file to execute, after Go's `exec.LookPath`, whose words are expected.
fn find(name: &str, path: &str) -> Result<String, String> {
    if name.contains('/') {
        return match fs::metadata(name) {
            Err(e) => Err(format!("exec: {name:?}: stat {name}: {}", words(&e))),
            Ok(m) if m.is_dir() => Err(format!("exec: {name:?}: is a directory")),
            Ok(m) if m.permissions().mode() & 0o111 == 0 => Err(format!("exec: {name:?}: permission denied")),
            Ok(_) => Ok(name.to_owned()),
        };
    }
    let usable =
        |file: &String| fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    path.split(':')
        .filter(|_| !name.is_empty())
        .map(|dir| format!("{}/{name}", if dir.is_empty() { "." } else { dir }))
        .find(usable)
        .ok_or_else(|| format!("exec: {name:?}: executable file not found in $PATH"))
}

/// `A=b` strings as a map; the last of two wins.
pub(crate) fn environment(vars: &[String]) -> BTreeMap<String, String> {
    vars.iter().filter_map(|v| v.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

/// The home directory of a user by the container's `/etc/passwd`, else `/`.
pub(crate) fn home(uid: u32) -> String {
    // Bounded: the file is the image's.
    let text = fs::File::open("/etc/passwd").and_then(|f| {
        let mut text = String::new();
        std::io::Read::read_to_string(&mut std::io::Read::take(f, 1 << 20), &mut text)?;
        Ok(text)
    });
    let text = text.unwrap_or_default();
    let mut found = text.lines().map(|l| l.split(':').collect::<Vec<_>>()).filter(|f| f.len() >= 6);
    found.find(|f| f[2].parse() == Ok(uid)).map_or_else(|| "/".into(), |f| f[5].to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn failures_are_in_runcs_words() {
        let none = BTreeMap::new();
        assert_eq!(
            execute(&["foo-bar".into()], &none),
            "exec: \"foo-bar\": executable file not found in $PATH"
        );
        assert_eq!(
            execute(&["/no/foo".into()], &none),
            "exec: \"/no/foo\": stat /no/foo: no such file or directory"
        );
        assert_eq!(execute(&["/etc".into()], &none), "exec: \"/etc\": is a directory");
        assert_eq!(execute(&["/etc/passwd".into()], &none), "exec: \"/etc/passwd\": permission denied");
        assert_eq!(execute(&[String::new()], &none), "exec: \"\": executable file not found in $PATH");
        assert_eq!(execute(&[], &none), "no command given");
    }

    #[test]
    fn the_path_of_the_environment_is_searched() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tool");
        fs::write(&file, "not a program").unwrap();
        let path = format!("/nowhere:{}", dir.path().display());
        assert!(find("tool", &path).is_err(), "not executable");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find("tool", &path).unwrap(), file.to_str().unwrap());
        let env = environment(&[format!("PATH={path}")]);
        assert!(execute(&["tool".into()], &env).ends_with("tool: exec format error"));
    }

    #[test]
    fn a_home_is_found_by_uid() {
        assert_eq!(home(0), "/root");
        assert_eq!(home(4_000_000), "/");
    }
}
