#!/bin/sh
# Makes the passwords that compose.yaml names, in secrets/ beside this file. What is there already is left as it is.
#
# The folder is its owner's alone. The files in it can be read by all, since Compose hands them to containers with the owner
# and mode that they have here, and the users in there are others.
set -eu
cd "$(dirname "$0")"
mkdir -p -m 700 secrets
cd secrets
if [ -e ray_token ]; then
    echo "docker/secrets is there already"
    exit
fi
umask 333
random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
postgres=$(random) mlflow=$(random) key=$(random | cut -c1-20) secret=$(random)

printf %s "$postgres" > postgres_password
cat > mlflow_server <<END
PGPASSWORD=$postgres
MLFLOW_AUTH_ADMIN_PASSWORD=$mlflow
MLFLOW_FLASK_SERVER_SECRET_KEY=$(random)
END
cat > mlflow_credentials <<END
[mlflow]
mlflow_tracking_username = lab
mlflow_tracking_password = $mlflow
END
cat > s3_keys <<END
[default]
aws_access_key_id = $key
aws_secret_access_key = $secret
END
cat > s3_server <<END
{"identities": [{
  "name": "dmsae",
  "credentials": [{"accessKey": "$key", "secretKey": "$secret"}],
  "actions": ["Admin", "Read", "List", "Tagging", "Write"]
}]}
END
printf %s "$(random)" > ray_token
