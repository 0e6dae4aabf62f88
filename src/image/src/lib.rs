//! OCI images: registry client, layer pipeline, image store.
