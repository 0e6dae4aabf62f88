//! The host's subordinate id ranges: LXC asks newuidmap, which wants root's range in `/etc/subuid` and `/etc/subgid`.
