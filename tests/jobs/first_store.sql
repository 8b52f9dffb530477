BEGIN TRANSACTION;
CREATE TABLE events (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	created_at INTEGER NOT NULL, 
	id VARCHAR NOT NULL, 
	job VARCHAR NOT NULL, 
	level VARCHAR NOT NULL, 
	message VARCHAR NOT NULL, 
	type VARCHAR NOT NULL, 
	data JSON, 
	UNIQUE (id)
);
INSERT INTO "events" VALUES(1,1795838258,'ftevent-kaP1GouACSdGtxvEt09j4y2j','ftjob-old','info','Created fine-tuning job: ftjob-old','message','{}');
INSERT INTO "events" VALUES(2,1795838258,'ftevent-BjtCIhBxS25p163n2UnA3kfL','ftjob-old','info','Files validated, moving job to queued state','message','{}');
CREATE TABLE files (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	created_at INTEGER NOT NULL, 
	id VARCHAR NOT NULL, 
	purpose VARCHAR NOT NULL, 
	filename VARCHAR NOT NULL, 
	bytes INTEGER NOT NULL, 
	sha256 VARCHAR NOT NULL, 
	deleted_at INTEGER, 
	UNIQUE (id)
);
INSERT INTO "files" VALUES(1,1795838258,'file-old','fine-tune','a.jsonl',7,'00',NULL);
CREATE TABLE jobs (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	created_at INTEGER NOT NULL, 
	id VARCHAR NOT NULL, 
	status VARCHAR NOT NULL, 
	finished_at INTEGER, 
	base VARCHAR NOT NULL, 
	model VARCHAR NOT NULL, 
	tuned_name VARCHAR NOT NULL, 
	request JSON NOT NULL, 
	numbers JSON NOT NULL, 
	is_checked BOOLEAN NOT NULL, 
	trained_tokens INTEGER, 
	result_file VARCHAR, 
	error JSON, 
	attempts INTEGER NOT NULL, 
	last_checkpoint INTEGER NOT NULL, 
	UNIQUE (id)
);
INSERT INTO "jobs" VALUES(1,1795838258,'ftjob-old','queued',NULL,'tiny','tiny','ft:tiny:tunesmith::12345678','{"model": "tiny", "training_file": "file-old", "validation_file": null, "suffix": null, "seed": 1, "metadata": null, "integrations": [], "hyperparameters": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}}','{"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}',0,NULL,NULL,NULL,0,-1);
CREATE TABLE models (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	created_at INTEGER NOT NULL, 
	name VARCHAR NOT NULL, 
	job VARCHAR NOT NULL, 
	base VARCHAR NOT NULL, 
	step INTEGER NOT NULL, 
	metrics JSON NOT NULL, 
	deleted_at INTEGER, 
	UNIQUE (name)
);
CREATE INDEX ix_jobs_status ON jobs (status);
CREATE INDEX ix_events_job ON events (job);
CREATE INDEX ix_models_job ON models (job);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('files',1);
INSERT INTO "sqlite_sequence" VALUES('jobs',1);
INSERT INTO "sqlite_sequence" VALUES('events',2);
COMMIT;
PRAGMA user_version = 1;
