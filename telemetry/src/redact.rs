//! Taking secrets out of texts before they are logged, traced, reported or shown.
//!
//! The last line of defence, not the first: secrets are not put into texts on purpose, but error texts of servers,
//! drivers and libraries quote what they were given. When in doubt it masks too much: a lost word in a message costs
//! less than a password in a log.

use std::borrow::Cow;
use std::fmt;
use std::sync::{LazyLock, OnceLock};

use regex::{Captures, Regex};

/// What stands where a secret was.
pub const MASK: &str = "***";

/// The text without secrets; borrowed when there was nothing to take out. Scrubbing twice changes nothing more.
pub fn scrub(text: &str) -> Cow<'_, str> {
    let lower = text.to_ascii_lowercase();
    let mut scrubbed = Cow::Borrowed(text);
    for rule in RULES.iter().filter(|rule| (rule.when)(&lower)) {
        let pattern = rule.compiled.get_or_init(|| compile(&rule.pattern));
        let next = match rule.how {
            How::Replace(with) => pattern.replace_all(&scrubbed, with),
            How::Call(with) => pattern.replace_all(&scrubbed, with),
        };
        if let Cow::Owned(next) = next
            && next != *scrubbed
        {
            scrubbed = Cow::Owned(next);
        }
    }
    scrubbed
}

/// An error and its causes on one line, without secrets.
pub fn scrub_error(error: &dyn std::error::Error) -> String {
    scrub(&proto::failure::chain(error)).into_owned()
}

/// The value of a named field without secrets, or `None` if it may stay as it is.
pub(crate) fn scrub_field(key: &str, value: &str) -> Option<String> {
    if SECRET_KEY.is_match(key) && !value.is_empty() && value != MASK {
        return Some(MASK.to_owned());
    }
    match scrub(value) {
        Cow::Owned(scrubbed) => Some(scrubbed),
        Cow::Borrowed(_) => None,
    }
}

/// Prints what is inside without secrets: `error!(error = %Redacted(&error), …)`.
pub struct Redacted<T>(pub T);

impl<T: fmt::Display> fmt::Display for Redacted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&scrub(&self.0.to_string()))
    }
}

impl<T: fmt::Debug> fmt::Debug for Redacted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&scrub(&format!("{:?}", self.0)))
    }
}

/// Names whose value is a secret: `password`, `PGPASSWORD`, `secret_access_key`, `X-Amz-Signature` …
const KEY: &str = r"(?:[a-z0-9_.-]*(?:password|passwd|passphrase|pwd|secret|token|credentials?|signature|private[_-]?key|api[_-]?key|access[_-]?key(?:[_-]?id)?|account[_-]?key|encryption[_-]?key|signing[_-]?key|master[_-]?key|shared[_-]?key|customer[_-]?key|secret[_-]?key))";

/// A value in quotes of any kind, also a cut one, and also as it looks inside JSON or Rust's `Debug`.
const QUOTED: &str = concat!(
    "(?:",
    // Escaped once: `\"` ends it, `\\\"` is a quote inside.
    r#"\\"(?:[^"\\]|\\\\\\["\\]|\\\\[^"\\]|\\[^"\\])*(?:\\")?|"#,
    // Escaped more than once.
    r#"\\{2,}"(?:[^"\\]|\\[^"\\])*(?:\\+")?|"#,
    r#""(?:[^"\\]|\\.)*(?:"|$)|"#,
    // In single quotes, where `\'` may have become `\\'` on the way: closed, closed beyond a double quote, cut off.
    r#"'(?:[^'\\"]|\\+[^\\]|'')*'|'(?:[^'\\]|\\+[^\\]|'')*'|'(?:[^'\\"]|\\+[^\\])*"#,
    ")"
);

/// A value without quotes ends at a blank or a separator.
const BARE: &str = r#"[^\s,;&"'(){}\[\]<>\\]+"#;

/// Names that end like a secret and are none.
const HARMLESS_KEYS: [&str; 3] = ["fencing_token", "fencing-token", "fencing.token"];

/// What follows `password: ` in messages of ours and the system's; any other word may be the password.
const PROSE: [&str; 28] = [
    "a",
    "an",
    "access",
    "authentication",
    "cannot",
    "connection",
    "could",
    "empty",
    "environment",
    "expected",
    "expired",
    "failed",
    "file",
    "invalid",
    "is",
    "missing",
    "must",
    "no",
    "not",
    "operation",
    "permission",
    "the",
    "unexpected",
    "unknown",
    "unset",
    "use",
    "was",
    "wrong",
];

enum How {
    Replace(&'static str),
    Call(fn(&Captures<'_>) -> String),
}

/// Looks at the text in lower case and says whether the pattern could match. Most lines hold no word that asks for
/// a closer look, and most processes never compile most patterns.
type When = fn(&str) -> bool;

struct Rule {
    when: When,
    pattern: String,
    how: How,
    compiled: OnceLock<Regex>,
}

static RULES: LazyLock<Vec<Rule>> = LazyLock::new(rules);

static SECRET_KEY: LazyLock<Regex> = LazyLock::new(|| compile(&format!("(?i)^{KEY}$")));

fn compile(pattern: &str) -> Regex {
    Regex::new(pattern).expect("the patterns are constants, and a test compiles them")
}

fn has(text: &str, words: &[&str]) -> bool {
    words.iter().any(|word| text.contains(word))
}

/// Whether a name of [`KEY`] may be in the text.
fn names_secret(text: &str) -> bool {
    has(text, &["passw", "passphrase", "pwd", "secret", "token", "credential", "signature", "key"])
}

/// The rules, from the most specific to the most general.
fn rules() -> Vec<Rule> {
    let rule =
        |when: When, pattern: String, how| Rule { when, pattern, how, compiled: OnceLock::new() };
    let all = |when: When, pattern: &str| rule(when, pattern.to_owned(), How::Replace(MASK));
    // The first group stays, the rest goes.
    let rest = |when: When, pattern: &str| rule(when, pattern.to_owned(), How::Replace("${1}***"));
    let value = |when: When, pattern: String| rule(when, pattern, How::Call(mask_value));
    vec![
        // Private keys, whole and cut off; a quote ends a cut one, so that a JSON line stays JSON.
        all(
            |t| t.contains("private key"),
            r#"-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----[^"]*?-----END [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----"#,
        ),
        all(|t| t.contains("private key"), r#"-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----[^"]*"#),
        all(|t| t.contains("age-secret-key"), r"(?i)AGE-SECRET-KEY-1[A-Z0-9]+"),
        // Headers: everything to the end of the line or the quote.
        rest(
            |t| t.contains("authorization"),
            r#"(?i)\b((?:proxy-)?authorization\\*["']?\s*[:=,]\s*\\*["']?)[^"'\\\r\n]+"#,
        ),
        rest(
            |t| has(t, &["x-", "cookie"]),
            r#"(?i)\b((?:x-api-key|x-auth-token|x-vault-token|x-amz-security-token|x-amz-server-side-encryption-customer-key(?:-md5)?|(?:set-)?cookie)\\*["']?\s*[:=,]\s*\\*["']?)[^"'\\\r\n]+"#,
        ),
        rest(|t| has(t, &["bearer", "basic"]), r"(?i)\b((?:bearer|basic)\s+)[a-z0-9+/._~=-]{20,}"),
        // URLs that are secrets as a whole.
        rest(
            |t| has(t, &["hooks.slack", "webhook"]),
            r#"(https://(?:hooks\.slack\.com/(?:services|workflows)|(?:[a-z]+\.)?discord(?:app)?\.com/api/webhooks|[a-z0-9.-]+\.webhook\.office\.com)/)[^\s"'<>]+"#,
        ),
        // URLs with a password, also percent-encoded as a whole, and keys in their query.
        rule(
            |t| t.contains("://") && t.contains('@'),
            r#"(?i)[a-z][a-z0-9+.-]*://[^\s"'<>]*@"#.to_owned(),
            How::Call(mask_urls),
        ),
        rest(
            |t| t.contains("%3a%2f%2f"),
            r#"(?i)(%3A%2F%2F[^\s%]+%3A)(?:[^\s&"'%]|%[0-9a-f]{2})*?%40"#,
        ),
        rest(|t| has(t, &["?", "&"]), r#"(?i)([?&](?:sig|auth|key|code|sas)=)[^&\s"'<>]+"#),
        // Lines of a password file: host:port:database:user:password.
        rest(
            |t| t.split_whitespace().any(|word| word.matches(':').count() >= 4),
            r#"(?m)((?:^|[\s"'=(])[^\s:"'()]+:(?:\d{1,5}|\*):(?:[^:\s\\]|\\.)+:(?:[^:\s\\]|\\.)+:)[^\s"']+"#,
        ),
        // PostgreSQL's verifiers and SQL that sets a password.
        rest(|t| t.contains("scram-sha-256$"), r#"(SCRAM-SHA-256\$)\d+:[^\s"'\\]+"#),
        all(|t| t.contains("md5"), r"\bmd5[0-9a-f]{32}\b"),
        rule(
            names_secret,
            format!(r"(?i)\b({KEY}\s+(?:E|U&)?)'(?:[^'\\]|\\+[^\\]|'')*(?:'|$)"),
            How::Replace("${1}'***'"),
        ),
        rule(
            |t| t.contains('$') && names_secret(t),
            format!(r"(?i)\b({KEY}\s+)\$[a-z_]*\$[^$]*(?:\$[a-z_]*\$|$)"),
            How::Replace("${1}'***'"),
        ),
        // Tokens that show by their own shape.
        all(
            |t| has(t, &["akia", "asia", "agpa", "aida", "aroa", "abia", "acca"]),
            r"\b(?:AKIA|ASIA|AGPA|AIDA|AROA|ABIA|ACCA)[A-Z0-9]{16}\b",
        ),
        all(
            |t| {
                has(
                    t,
                    &[
                        "ghp_",
                        "gho_",
                        "ghu_",
                        "ghs_",
                        "ghr_",
                        "github_pat_",
                        "glpat-",
                        "npm_",
                        "pypi-",
                    ],
                )
            },
            r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,})",
        ),
        all(
            |t| has(t, &["xox", "k_live_", "k_test_", "sk-", "hvs.", "dop_v1_", "sg."]),
            r"\b(?:xox[abeoprs]-[A-Za-z0-9-]{10,}|[rs]k_(?:live|test)_\w{10,}|sk-[A-Za-z0-9_-]{20,}|hvs\.[\w-]{20,}|dop_v1_[a-f0-9]{64}|SG\.[\w-]{16,}\.[\w-]{16,})",
        ),
        all(|t| has(t, &["aiza", "ya29."]), r"\b(?:AIza[\w-]{35}|ya29\.[\w-]{10,})"),
        all(|t| t.contains(":aa"), r"\b\d{8,10}:AA[A-Za-z0-9_-]{33}\b"),
        all(|t| t.contains("eyj"), r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}(?:\.[\w-]*)?"),
        // XML, as S3 and STS answer.
        rest(
            |t| t.contains('<') && has(t, &["passw", "secret", "token", "accesskeyid"]),
            r"(?i)(<[a-z]*(?:password|secret|secretaccesskey|token|accesskeyid)>)[^<]+",
        ),
        // Words that are followed by a whole line of secret.
        rest(
            |t| t.contains("recovery"),
            r#"(?i)\b(recovery[ _-]?(?:key|phrase|code)s?\s*[:=]\s*)[^\r\n"]+"#,
        ),
        // PagerDuty's keys; RabbitMQ's routing keys look different and are shown.
        rest(
            |t| has(t, &["routing", "integration"]),
            r#"(?i)((?:routing|integration)[_-]?key\\*["']?\s*[:=]\s*\\*["']?)[0-9a-z]{32}\b"#,
        ),
        // Command lines.
        rest(
            |t| has(t, &["-u", "-user"]),
            r#"(?i)((?:^|\s)(?:-u|--user|--proxy-user)[\s=]+[^\s:"']+:)[^\s"']+"#,
        ),
        value(
            |t| t.contains("--") && names_secret(t),
            format!(
                r#"(?i)((?:^|[\s"'])--{KEY}(?:[\s=]+|\\*["'],\s*\\*["']))({QUOTED}|[^\s"'\\-](?:[^\s"'\\]|\\[^"'])*)"#
            ),
        ),
        // name=value, name: value, "name": "value", name: Some("value"), ("name", "value").
        value(
            names_secret,
            format!(
                r#"(?i)\b({KEY}\\*["']?(?:\s*(?::|=>|=)\s*|["']\s*,\s*)(?:[a-z]+\()*(?:E|U&)?)({QUOTED}|{BARE})"#
            ),
        ),
    ]
}

/// Keeps the name and the quotes, masks what is inside.
fn mask_value(found: &Captures<'_>) -> String {
    let (name, value) = (&found[1], &found[2]);
    let lower = name.to_ascii_lowercase();
    let harmless_key = HARMLESS_KEYS.iter().any(|key| lower.trim_start().starts_with(key));
    let prose = lower.trim_end().ends_with(':')
        && PROSE.contains(&value.trim_end_matches(['.', ':']).to_ascii_lowercase().as_str());
    // `secret=file:/run/secret` names a place, not a secret.
    let reference = ["file:", "env:", "exec:"]
        .iter()
        .any(|kind| value.trim_start_matches(['"', '\\', '\'']).starts_with(kind));
    if harmless_key || prose || reference {
        return found[0].to_owned();
    }
    let inner = value.trim_start_matches('\\');
    let opening = &value[..value.len() - inner.len()];
    match inner.chars().next().filter(|first| matches!(first, '"' | '\'')) {
        Some(quote) => {
            let closed = inner.len() > 1 && inner.ends_with(quote);
            let closing = if closed { format!("{opening}{quote}") } else { String::new() };
            format!("{name}{opening}{quote}{MASK}{closing}")
        }
        None => format!("{name}{MASK}"),
    }
}

/// Masks the password of every URL in one run of characters without blanks.
fn mask_urls(found: &Captures<'_>) -> String {
    let text = &found[0];
    // The run may hold several URLs, "amqp://a:b@h1,amqp://c:d@h2": each begins after the one before.
    let mut masked = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (scheme, after) = rest.split_at(at + 3);
        masked.push_str(scheme);
        let end = after.find("://").map_or(after.len(), |next| {
            after[..next]
                .rfind(|c: char| !(c.is_ascii_alphanumeric() || "+.-".contains(c)))
                .map_or(next, |before| before + 1)
        });
        masked.push_str(&mask_authority(&after[..end]));
        rest = &after[end..];
    }
    masked.push_str(rest);
    masked
}

/// `user:secret@host/path` to `user:***@host/path`.
fn mask_authority(url: &str) -> String {
    let Some(colon) = url.find(':') else { return url.to_owned() };
    // The user ends at the first colon; a colon behind a slash, a bracket or an @ belongs to something else.
    if url[..colon].contains(['/', '@', '[', '?', '#']) {
        return url.to_owned();
    }
    // A password may hold an unescaped slash, @ or ?, so it ends at the last @ of all: rather lose a host and a path
    // (as of `http://host:9000/x@y`) than keep half a password.
    let Some(at) = url.rfind('@') else { return url.to_owned() };
    format!("{}:{MASK}{}", &url[..colon], &url[at..])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECRET: &str = "hunter2Zx9";
    const PEM: &str = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC";

    /// Texts as they come from drivers, servers, files, shells and SDKs; `{}` stands for the secret.
    const SEEDED: &[(&str, &str)] = &[
        (
            "postgres url",
            "connect to postgres://backup:{}@db1:5432/orders?sslmode=verify-full failed",
        ),
        ("url without host name", "postgresql://backup:{}@/orders?host=/run/postgresql"),
        ("amqp url", "amqps://guest:{}@rabbit.example:5671/%2f: refused"),
        ("two urls in one word", "amqp://a:{}@h1,amqp://b:{}@h2"),
        ("url with @ and / in the password", "postgres://u:p@{}/x@db1/orders"),
        ("http proxy", "proxy http://user:{}@proxy:3128 answered 407"),
        ("password in a query", "postgres://db1/orders?user=u&password={}&connect_timeout=5"),
        ("sslpassword in a query", "postgres://db1/orders?sslpassword={}"),
        ("percent-encoded url", "redirect=postgres%3A%2F%2Fu%3A{}%40db1%2Forders"),
        ("conninfo", "host=db1 user=u password={} dbname=x"),
        ("conninfo with blanks", "host = db1 password = {}"),
        ("conninfo quoted", r"host=db1 password='{} \' and more' dbname=x"),
        ("conninfo quoted, cut off", "could not parse: password='{} and then the text ends"),
        ("environment", "PGPASSWORD={} pg_dump -h db1"),
        ("environment of aws", "AWS_SECRET_ACCESS_KEY={}\nAWS_REGION=us-east-1"),
        ("environment, exported", "export RESTIC_PASSWORD=\"{}\""),
        ("debug of a map of variables", "{\"PGPASSWORD\": \"{}\", \"PGHOST\": \"db1\"}"),
        ("debug of a struct", "Config { user: Some(\"u\"), password: Some(\"{}\"), port: 5432 }"),
        ("debug of a tuple", "[(\"password\", \"{}\"), (\"user\", \"u\")]"),
        ("json", r#"{"user":"u","password":"{}","port":5432}"#),
        ("json with an escaped quote", r#"{"password":"a\"{}","port":5432}"#),
        ("json in json", r#"{"message":"{\"password\":\"{}\"}","level":"INFO"}"#),
        ("toml", "secret_access_key = \"{}\""),
        ("yaml", "password: {}\nuser: x"),
        ("create role", "ALTER ROLE backup WITH PASSWORD '{}'"),
        ("create role, escapes", r"CREATE ROLE backup ENCRYPTED PASSWORD E'a\'{}' LOGIN"),
        ("create role, doubled quotes", "CREATE USER u PASSWORD 'a''{}'"),
        ("create role, dollar quotes", "ALTER ROLE u PASSWORD $x${}$x$"),
        ("user mapping", "CREATE USER MAPPING FOR u SERVER s OPTIONS (user 'u', password '{}')"),
        ("s3 option of a mapping", "OPTIONS (aws_secret_access_key '{}')"),
        ("scram verifier", "rolpassword SCRAM-SHA-256$4096:{}$stored:server"),
        ("pgpass line", "invalid line in file: db1:5432:*:backup:{}"),
        ("pgpass line with escapes", r"*:*:or\:ders:backup:{}"),
        ("authorization basic", "Authorization: Basic {}"),
        (
            "authorization bearer in debug",
            "{\"authorization\": \"Bearer {}\", \"accept\": \"*/*\"}",
        ),
        (
            "sigv4 header",
            "authorization: AWS4-HMAC-SHA256 Credential=x/2026, SignedHeaders=host, Signature={}",
        ),
        ("presigned url", "GET https://s3/b/k?X-Amz-Expires=60&X-Amz-Signature={}&x-id=GetObject"),
        ("security token", "X-Amz-Security-Token: {}"),
        ("sse-c key", "x-amz-server-side-encryption-customer-key: {}"),
        ("cookie", "Set-Cookie: session={}; HttpOnly"),
        ("azure connection string", "AccountName=x;AccountKey={};EndpointSuffix=core.windows.net"),
        ("azure sas", "https://x.blob.core.windows.net/c?sv=2024&sig={}"),
        ("slack webhook", "POST https://hooks.slack.com/services/T000/B000/{} answered 404"),
        ("discord webhook", "https://discord.com/api/webhooks/123/{}"),
        ("token in json", r#"{"access_token": "{}", "expires_in": 3600}"#),
        ("client secret in a form", "grant_type=client_credentials&client_secret={}&scope=x"),
        ("token as an option", "pgmuster status --token {} -o json"),
        ("password as an option", "mc alias set --secret-key={} x"),
        ("options as an argv", r#"["pgmuster", "--token", "{}", "status"]"#),
        ("curl user", "curl -u backup:{} https://api"),
        ("sts answer", "<SecretAccessKey>{}</SecretAccessKey><Expiration>x</Expiration>"),
        ("passphrase", "passphrase: {}"),
        ("recovery key", "recovery key: AAAA-BBBB {} CCCC"),
        ("encryption key", "encryption-key={}"),
        (
            "private key in pem",
            "-----BEGIN PRIVATE KEY-----\nMIIEvQ{}\n-----END PRIVATE KEY-----\nafter",
        ),
        ("private key in pem, cut off", "key: -----BEGIN RSA PRIVATE KEY-----\nMIIEvQ{}"),
        (
            "private key of a service account",
            r#"{"private_key": "-----BEGIN PRIVATE KEY-----\nMIIE{}\n-----END PRIVATE KEY-----\n"}"#,
        ),
    ];

    /// Secrets that show by their own shape, in no context at all.
    const SHAPED: &[&str] = &[
        "AKIAIOSFODNN7EXAMPLE",
        "ASIAIOSFODNN7EXAMPLE",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "github_pat_11ABCDEFG0abcdefghijklmnop",
        "glpat-abcdefghijklmnopqrst",
        "xoxb-123456789012-abcdefghijkl",
        "sk_live_abcdefghijklmnop",
        "hvs.abcdefghijklmnopqrstuvwxyz",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N",
        "AGE-SECRET-KEY-1QQPQYRQQ8ZXC0K4XG3C9W7VJ5ENR6X2F4TL",
        "md50123456789abcdef0123456789abcdef",
        "123456789:AAabcdefghijklmnopqrstuvwxyz0123456",
        "SG.abcdefghijklmnopqr.abcdefghijklmnopqrst",
    ];

    #[test]
    fn no_seeded_secret_survives() {
        for (kind, text) in SEEDED {
            let text = text.replace("{}", SECRET);
            let scrubbed = scrub(&text);
            assert!(!scrubbed.contains(SECRET), "{kind}: {scrubbed}");
            assert!(scrubbed.contains(MASK), "{kind}: {scrubbed}");
            assert_eq!(scrub(&scrubbed), scrubbed, "{kind}: a second time changes nothing");
        }
        for rule in RULES.iter() {
            compile(&rule.pattern);
        }
        for secret in SHAPED {
            let text = format!("the server said {secret} and went on");
            assert_eq!(scrub(&text), format!("the server said {MASK} and went on"));
        }
    }

    #[test]
    fn no_seeded_secret_survives_inside_debug_or_json_text() {
        for (kind, text) in SEEDED {
            let text = text.replace("{}", SECRET);
            for carried in [format!("{text:?}"), serde_json::json!({ "message": text }).to_string()]
            {
                assert!(!scrub(&carried).contains(SECRET), "{kind}: {}", scrub(&carried));
            }
            let line = serde_json::json!({ "message": text, "port": 1 }).to_string();
            let scrubbed = scrub(&line);
            let parsed = serde_json::from_str::<serde_json::Value>(&scrubbed);
            let parsed = parsed.unwrap_or_else(|error| panic!("{kind}: {error}: {scrubbed}"));
            assert_eq!(parsed["port"], 1, "{kind}: {scrubbed}");
        }
    }

    #[test]
    fn what_helps_is_kept() {
        for (text, expected) in [
            ("postgres://backup:x1y2@db1:5432/orders", "postgres://backup:***@db1:5432/orders"),
            ("host=db1 password=x1y2 dbname=orders", "host=db1 password=*** dbname=orders"),
            (
                r#"{"user":"u","password":"x1y2","port":5432}"#,
                r#"{"user":"u","password":"***","port":5432}"#,
            ),
            ("ALTER ROLE b PASSWORD 'x1y2' LOGIN", "ALTER ROLE b PASSWORD '***' LOGIN"),
            ("password: Some(\"x1y2\"), port: 1", "password: Some(\"***\"), port: 1"),
            ("a://u:x1y2@h, then", "a://u:***@h, then"),
            ("https://h/?a=1&sig=x1y2&b=2", "https://h/?a=1&sig=***&b=2"),
        ] {
            assert_eq!(scrub(text), expected);
        }
    }

    #[test]
    fn harmless_texts_are_borrowed_unchanged() {
        for text in [
            "password authentication failed for user \"backup\"",
            "failed to read the password: No such file or directory (os error 2)",
            "password: permission denied",
            "postgres://backup@db1:5432/orders?sslmode=require",
            "connect to http://127.0.0.1:5432/a",
            "[::1]:5432 refused",
            "job 0199f0c2-5b7e-7c3a-8a52-0a1b2c3d4e5f attempt 2 of 3",
            "traceparent 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "routing_key=pgmuster.jobs.site.fra1.urgent",
            "fencing_token=42 granted",
            "secret = \"file:/run/secrets/s3\"",
            "password_file = \"/etc/pgmuster/password\"",
            "packs/0199f0c2/ab12 has 3 keys: a, b, c",
            "2026-11-22T18:17:03.123456Z  INFO worker: 12:34:56 backup done",
            "syntax error at or near \"SELECT\" at 12:5",
            "signature invalid",
        ] {
            assert!(matches!(scrub(text), Cow::Borrowed(_)), "{text} became {}", scrub(text));
        }
    }

    #[test]
    fn a_field_is_judged_with_its_name() {
        assert_eq!(scrub_field("db.password", "x1y2").as_deref(), Some(MASK));
        assert_eq!(scrub_field("password", ""), None);
        assert_eq!(scrub_field("cluster", "orders"), None);
        assert_eq!(scrub_field("url", "a://u:p@h").as_deref(), Some("a://u:***@h"));
    }

    #[test]
    fn redacted_prints_and_debugs_without_the_secret() {
        let text = format!("connect to a://u:{PEM}@h");
        assert_eq!(Redacted(&text).to_string(), "connect to a://u:***@h");
        assert_eq!(format!("{:?}", Redacted(&text)), "\"connect to a://u:***@h\"");
        let error = std::io::Error::other(text);
        assert_eq!(scrub_error(&error), "connect to a://u:***@h");
    }

    proptest! {
        #[test]
        fn a_url_password_of_any_shape_goes(password in "[!-~&&[^\"'<>]]{8,20}", user in "[a-z]{1,8}") {
            // Only a password that is longer than anything else in the text can be looked for.
            // One with `://` in it looks like two URLs.
            prop_assume!(!password.contains("***") && !password.contains("//"));
            let text = format!("failed: postgres://{user}:{password}@db1.example:5432/orders");
            prop_assert!(!scrub(&text).contains(&password), "{}", scrub(&text));
        }

        #[test]
        fn a_conninfo_password_of_any_shape_goes(password in "[!-~&&[^\"'(){}\\[\\]<>,;&\\\\]]{8,20}") {
            prop_assume!(!["file:", "env:", "exec:"].iter().any(|kind| password.starts_with(kind)));
            let text = format!("host=db1 password={password} dbname=x");
            prop_assert!(!scrub(&text).contains(&password), "{}", scrub(&text));
        }

        #[test]
        fn no_text_makes_it_panic(text in ".{0,200}") {
            let once = scrub(&text).into_owned();
            prop_assert!(once.len() <= text.len() + 16 * MASK.len() * (1 + text.len() / 8));
        }
    }
}
