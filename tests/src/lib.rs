//! What the stories in `tests/tests` share: the real services, and ways to disturb them.
//!
//! Deliberately not here: imitations. PostgreSQL clusters come from [`postgres::instance`], RabbitMQ and the S3 server
//! from `tests/services`; a test whose service is missing fails and says how to start it.

pub mod bucket;
pub mod fleet;
pub mod pooler;
pub mod program;
pub mod proxy;
pub mod rabbit;
pub mod services;
pub mod wait;

pub use bucket::Bucket;
pub use fleet::{Cluster, Fleet, Place, SOON, WorkerSetup};
pub use pooler::Pooler;
pub use program::{Finished, Pgmuster};
pub use proxy::Proxy;
pub use rabbit::{Rabbit, Vhost};
pub use wait::{eventually, eventually_async};
