# shellcheck shell=sh
# What the scripts beside this file share: the settings, and where the backups are. `settings.example` explains each.

settings=${PGMUSTER_SETTINGS:-/etc/pgmuster/backup.conf}
if [ -e "$settings" ]; then
  set -a
  # shellcheck source=scripts/backup/settings.example
  . "$settings"
  set +a
fi
: "${CLUSTER:=main}" "${BACKUP_DIR:=/var/backups/pgmuster}" "${RETENTION_DAYS:=30}"
: "${KEY_FILE:=${HOME:-/root}/.config/pgmuster/repository.key}"
REPOSITORY=${S3_BUCKET:+s3://$S3_BUCKET}
: "${REPOSITORY:=file://$BACKUP_DIR/repository}"

# The webhook is a secret: only the script that needs it has it, and none of its children.
# shellcheck disable=SC2034
webhook=${SLACK_WEBHOOK_URL:-}
unset SLACK_WEBHOOK_URL
