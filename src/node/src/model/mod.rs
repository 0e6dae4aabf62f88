//! What a pod is, as pure functions of its spec: by which labels and names it is found again, what it asks for and what that becomes
//! in a cgroup. Known to all rooms of the node; knows none of them.

pub(crate) mod names;
pub(crate) mod resources;
